"""What users calibrate with: every kind of file, and what is refused."""

from __future__ import annotations

import json
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress.calibration.data import CalibrationData
from onnxpress.calibration.files import Recording, Texts, read_records, read_wav
from onnxpress.errors import BadInputError, CorruptFileError, SourceNotFoundError


def write_wav(path: Path, values: list[float], *, rate: int = 16000, width: int = 2, channels: int = 1) -> None:
    full = 1 << (8 * width - 1)
    scaled = [min(round(value * full), full - 1) + (128 if width == 1 else 0) for value in values]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(b"".join(struct.pack("<i", value)[:width] for value in scaled))


class TestFiles:
    def test_text_is_one_record(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\ntwo\n")
        assert list(read_records(str(tmp_path / "a.txt"))) == [Texts("one\ntwo\n")]

    def test_json_lines(self, tmp_path: Path) -> None:
        rows: list[Any] = [
            {"text": "a", "id": 3},
            "b",
            {"sentence1": "c", "sentence2": "d", "score": 0.5},
            {"content": "e"},
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        found = list(read_records(str(tmp_path / "a.jsonl")))
        assert found == [Texts("a"), Texts("b"), Texts("c", "d"), Texts("e")]

    def test_json_lines_of_inputs(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2], "x": [[0.5]]}')
        (found,) = read_records(str(tmp_path / "a.jsonl"))
        assert isinstance(found, dict)
        assert found["input_ids"].tolist() == [1, 2]
        assert found["x"].shape == (1, 1)

    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    def test_rows_leave_numbers_and_the_header_out(self, suffix: str, tmp_path: Path) -> None:
        comma = "," if suffix == ".csv" else "\t"
        lines = [("sentence1", "sentence2", "score"), ("a man", "a woman", "2.5"), ("a dog runs", "", "1")]
        (tmp_path / f"a{suffix}").write_text("\n".join(comma.join(line) for line in lines))
        assert list(read_records(str(tmp_path / f"a{suffix}"))) == [Texts("a man", "a woman"), Texts("a dog runs")]

    def test_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.arange(6).reshape(3, 2), y=np.zeros((3, 1)))
        found = list(read_records(str(tmp_path / "a.npz")))
        assert [one["x"].tolist() for one in found if isinstance(one, dict)] == [[0, 1], [2, 3], [4, 5]]

    @pytest.mark.parametrize("width", [1, 2, 3, 4])
    def test_recordings(self, width: int, tmp_path: Path) -> None:
        values = [0.0, 0.5, -0.5, -1.0]
        write_wav(tmp_path / "b.wav", values, width=width)
        write_wav(tmp_path / "a.wav", [0.25, 0.75, -0.5, 0.5], width=width, channels=2)
        first, second = read_records(str(tmp_path))
        assert isinstance(first, Recording)
        assert isinstance(second, Recording)
        assert (first.name, second.rate) == ("a.wav", 16000)
        np.testing.assert_allclose(first.samples, [0.5, 0.0], atol=1 / 127)
        np.testing.assert_allclose(second.samples, values, atol=1 / 127)

    @pytest.mark.parametrize(
        ("name", "content", "error", "message"),
        [
            ("a.txt", b" \n", BadInputError, "is empty"),
            ("a.txt", b"\xff\xfe", BadInputError, "not UTF-8"),
            ("a.jsonl", b'{"text": "a"}\n{', CorruptFileError, "line 2: not JSON"),
            ("a.jsonl", b'{"number": "x", "y": {}}', BadInputError, "line 1: neither a text nor inputs"),
            ("a.jsonl", b'{"x": [[1], [1, 2]]}', BadInputError, "line 1: rows of different lengths"),
            ("a.npz", b"PK\x03\x04", CorruptFileError, "cannot read"),
            ("a.wav", b"RIFF", CorruptFileError, "cannot read"),
        ],
    )
    def test_refusals(self, name: str, content: bytes, error: type[Exception], message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=message):
            list(read_records(str(tmp_path / name)))

    def test_arrays_of_different_lengths(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(2))
        with pytest.raises(BadInputError, match=r"holds x \[3\], y \[2\]"):
            list(read_records(str(tmp_path / "a.npz")))

    def test_pickles_in_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
        with pytest.raises(CorruptFileError, match="cannot read"):
            list(read_records(str(tmp_path / "a.npz")))

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(SourceNotFoundError, match="no such file or folder"):
            list(read_records(str(tmp_path / "a.txt")))
        with pytest.raises(BadInputError, match=r"has no \.wav files"):
            list(read_records(str(tmp_path)))

    def test_data_sets_need_their_package(self) -> None:
        with pytest.raises(SourceNotFoundError, match=r"data sets need a package|cannot read the data set"):
            list(read_records("no-such-owner/no-such-data-set"))

    def test_a_wav_of_nothing(self, tmp_path: Path) -> None:
        write_wav(tmp_path / "a.wav", [])
        with pytest.raises(BadInputError, match="is empty"):
            read_wav(tmp_path / "a.wav")


def write_tokenizer(folder: Path) -> None:
    """Every character of the alphabet is a token, a = 1."""
    import tokenizers

    words = {"?": 0, **{chr(ord("a") + i): i + 1 for i in range(26)}, " ": 27, "\n": 28, ".": 29}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


class TestFeeds:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))

    def test_what_a_decoder_wrote_is_kept(
        self, make_decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        graph, data = make_decoder(), CalibrationData(samples=20, length=8)
        first = data.feeds(graph)[""]
        assert sum(len(one["input_ids"]) for one in first) == 20
        monkeypatch.setattr("onnxpress.calibration.data.written_windows", lambda *_: pytest.fail("written again"))
        for one, other in zip(first, data.feeds(graph)[""], strict=True):
            assert (one["input_ids"] == other["input_ids"]).all()
        monkeypatch.undo()
        (kept,) = (tmp_path / "cache" / "texts").glob("*.npy")
        kept.write_bytes(kept.read_bytes()[:100])  # as a full disk would leave it
        monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))
        assert (data.feeds(graph)[""][0]["input_ids"] == first[0]["input_ids"]).all()

    def test_a_decoder_writes_by_itself(self, make_decoder: Any) -> None:
        graph = make_decoder()
        (found,) = CalibrationData().feeds(graph)[""]
        assert found["input_ids"].shape == (4, 64)
        assert found["attention_mask"].all()
        again, other = CalibrationData().feeds(graph)[""][0], CalibrationData(seed=2).feeds(graph)[""][0]
        assert (again["input_ids"] == found["input_ids"]).all()
        assert (other["input_ids"] != found["input_ids"]).any()

    def test_what_a_pass_wants_and_what_the_user_says(self, make_decoder: Any) -> None:
        graph = make_decoder()
        assert sum(len(one["input_ids"]) for one in CalibrationData().feeds(graph, 10, 5)[""]) == 10
        (found,) = CalibrationData(samples=3, length=7).feeds(graph, 10, 5)[""]
        assert found["input_ids"].shape == (3, 7)

    def test_text_is_cut_into_windows(self, make_decoder: Any, tmp_path: Path) -> None:
        graph = make_decoder()
        write_tokenizer(graph.parent)
        (tmp_path / "a.txt").write_text("abcdefghij")
        (found,) = CalibrationData(str(tmp_path / "a.txt"), samples=9, length=4).feeds(graph)[""]
        assert found["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
        assert found["position_ids"].tolist() == [[0, 1, 2, 3]] * 2

    def test_an_encoder_reads_a_row_a_sentence(self, make_encoder: Any, tmp_path: Path) -> None:
        graph = make_encoder()
        write_tokenizer(graph.parent)
        (tmp_path / "a.tsv").write_text("a b\tabcde\t1.5\n")
        (found,) = CalibrationData(str(tmp_path / "a.tsv"), length=4).feeds(graph)[""]
        assert found["input_ids"].tolist() == [[1, 27, 2, 0], [1, 2, 3, 4]]
        assert found["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]

    def test_inputs_that_the_model_does_not_take(self, make_encoder: Any, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", pixels=np.zeros((2, 3)))
        with pytest.raises(BadInputError, match=r"a\.npz holds pixels, which the model does not take"):
            CalibrationData(str(tmp_path / "a.npz")).feeds(make_encoder())

    def test_inputs_as_they_are(self, make_encoder: Any, tmp_path: Path) -> None:
        graph = make_encoder()
        np.savez(tmp_path / "a.npz", input_ids=np.arange(30).reshape(10, 3), attention_mask=np.ones((10, 3), np.int64))
        found = CalibrationData(str(tmp_path / "a.npz"), samples=9).feeds(graph)[""]
        assert [len(one["input_ids"]) for one in found] == [8, 1]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", "a", r"has 1 tokens"),
            ("a.jsonl", '{"text": "a"}\n{"input_ids": [1]}', r"mixes texts, recordings and inputs"),
            ("a.jsonl", "\n\n.", r"line 3: not JSON"),
        ],
    )
    def test_refusals(self, name: str, content: str, message: str, make_decoder: Any, tmp_path: Path) -> None:
        graph = make_decoder()
        write_tokenizer(graph.parent)
        (tmp_path / name).write_text(content)
        with pytest.raises(BadInputError, match=message):
            CalibrationData(str(tmp_path / name)).feeds(graph)

    def test_text_needs_a_tokenizer(self, make_decoder: Any, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("abc")
        with pytest.raises(BadInputError, match=r"no tokenizer\.json"):
            CalibrationData(str(tmp_path / "a.txt")).feeds(make_decoder())

    def test_sound_for_a_model_of_text(self, make_encoder: Any, tmp_path: Path) -> None:
        write_wav(tmp_path / "a.wav", [0.1] * 10)
        with pytest.raises(BadInputError, match="takes no samples of sound"):
            CalibrationData(str(tmp_path / "a.wav")).feeds(make_encoder())
