from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxpress.errors import BadInputError, SourceNotFoundError
from onnxpress.evaluation.texts import file_windows, pad_rows, read_pairs, sentences, written_windows
from onnxpress.runtime.decoder import DecoderSession


class Words:
    """A tokenizer whose token is the length of a word."""

    class Encoding:
        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding:
        return self.Encoding([len(word) for word in sequence.split()])


def test_windows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a bb ccc dddd eeeee ffffff ggggggg")
    assert [w.tolist() for w in file_windows(path, Words(), 5, 3)] == [[[1, 2, 3]], [[4, 5, 6]]]
    assert [w.tolist() for w in file_windows(path, Words(), 1, 3, start=0)] == [[[0, 1, 2]]]
    assert file_windows(path, Words(), 5, 100)[0].shape == (1, 7)
    with pytest.raises(SourceNotFoundError):
        file_windows(tmp_path / "none", Words(), 1, 3)
    path.write_text("one")
    with pytest.raises(BadInputError, match="1 tokens"):
        file_windows(path, Words(), 1, 3)


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('first,second,score\n"a, b",c,1.5\nd,e,2\n')
    assert read_pairs(path) == [("a, b", "c", 1.5), ("d", "e", 2.0)]
    path.with_suffix(".tsv").write_text("a, b\tc\t1.5\nd\te\t2\n")
    assert read_pairs(path.with_suffix(".tsv")) == read_pairs(path)
    path.write_text("a,b,1\nc,d,e\n")
    with pytest.raises(BadInputError, match="line 2"):
        read_pairs(path)
    path.write_text("a,b,1\n")
    with pytest.raises(BadInputError, match="1 pairs"):
        read_pairs(path)


def test_what_a_model_writes_depends_on_the_seed_only(make_decoder: Callable[..., Path]) -> None:
    model = DecoderSession(make_decoder())
    first, again = (written_windows(model, 3, 20, [1, 2], seed=0) for _ in range(2))
    assert [w.shape for w in first] == [(1, 20)] * 3
    assert [int(w[0, 0]) for w in first] == [1, 2, 1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], written_windows(model, 3, 20, [1, 2], seed=1)[0])


def test_samples_follow_the_distribution() -> None:
    class Coin:
        def prefill(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
            return np.log(np.broadcast_to(np.float32([0.1, 0.2, 0.7]), (*ids.shape, 3)))

        decode = prefill

    drawn = np.concatenate(written_windows(Coin(), 50, 101, [0]))[:, 1:]
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=3) / drawn.size, [0.1, 0.2, 0.7], atol=0.02)


def test_padding() -> None:
    ids, mask = pad_rows([[1, 2, 3], [4]], left=True, value=9)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
    assert pad_rows([[1, 2], [4]])[0].tolist() == [[1, 2], [4, 0]]


def test_built_in_sentences() -> None:
    lines = sentences()
    assert len(lines) == len(set(lines)) >= 30
    assert min(map(len, lines)) < 10 < 80 < max(map(len, lines))
