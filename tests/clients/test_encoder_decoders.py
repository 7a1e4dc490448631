"""transformers.js reads and listens with our encoder-decoders, and gets the tokens that transformers itself gets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress import pipeline
from onnxpress.requests import Judging

from .in_optimum import in_optimum

HERE = Path(__file__).parent
PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "encoder-decoders.md").read_text(encoding="utf-8")
PROGRAMS = {m[1]: m[2] for m in re.finditer(r"^```(?:python|js)\n(?:#|//) file: (\S+)\n(.*?)^```", PAGE, re.S | re.M)}
STEPS = 12
ROWS = [[5, 17, 40, 99, 3, 1], [8, 30, 2, 77, 1, 0]]
MASK = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
CHANGES: dict[str, dict[str, Any]] = {
    "t5": {"seed": 25, "tie_word_embeddings": False},  # one of the few that do not write the same word over and over
    "whisper": {
        "seed": 1,
        "max_source_positions": 50,  # of two frames of 10 ms: one second
        "num_mel_bins": 80,
        "begin_suppress_tokens": None,
        "tie_word_embeddings": False,
    },
}

Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A tiny random model by architecture, its processor saved as transformers saves one with a tokenizer."""
    from onnxpress.exporter import architectures

    def checkpoint(architecture: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / "checkpoints" / architecture
        if not folder.exists():
            folder.mkdir(parents=True)
            architectures.tiny_model(architecture, folder, **CHANGES.get(architecture, {}))
            if architecture == "whisper":
                import transformers

                part = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1).to_dict()
                content = {"feature_extractor": part, "processor_class": "WhisperProcessor"}
                (folder / "processor_config.json").write_text(json.dumps(content))
        return folder

    return checkpoint


def built(checkpoint: Path, output: Path, kind: str) -> Path:
    if kind == "fp32":
        return pipeline.export(str(checkpoint), output=output).path
    return pipeline.build(str(checkpoint), output=output, judging=Judging(benchmark=False)).path


def ask(node: Callable[..., str], client: str, folder: Path, **request: Any) -> Any:
    path = folder.parent / "request.json"  # a command line has no room for a waveform
    path.write_text(json.dumps(request))
    printed = node(HERE / "clients.mjs", client, str(folder.parent), folder.name, f"@{path}")
    return json.loads(printed.splitlines()[-1])


def our_tokens(folder: Path, feeds: dict[str, np.ndarray], start: int) -> list[list[int]]:
    """What our own runner generates greedily, all STEPS of them."""
    from onnxpress.evaluation import probes
    from onnxpress.evaluation.opening import open_model

    model = open_model(folder).model
    rows = []
    for row in range(len(next(iter(feeds.values())))):
        model.encode({name: value[row : row + 1] for name, value in feeds.items()})
        rows.append(probes.continuation(model, np.array([[start]]), STEPS)[0].tolist())
    return rows


def assert_same_up_to_a_tie(folder: Path, feeds: dict[str, np.ndarray], start: int, found: list[int]) -> None:
    """`found` are our own runner's tokens for one row, or part from them where two words are all but equally likely.

    The client computes its features itself: in int8 the last bit of one may tip a random model's choice.
    """
    from onnxpress.evaluation.opening import open_model

    model = open_model(folder).model
    model.encode(feeds)
    assert found[0] == start
    logits = model.prefill(np.array([[start]]))[0, -1]
    for token in found[1:]:
        if token != logits.argmax():
            assert logits.max() - logits[token] < 0.05 * logits.std()
            break
        logits = model.decode(np.array([[token]]))[0, -1]


def until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end, 1)] if end in tokens[1:] else tokens


@pytest.mark.client
def test_text(node: Callable[..., str], checkpoints: Checkpoints, tmp_path: Path) -> None:
    import torch
    import transformers

    checkpoint = checkpoints("t5")
    artifact = built(checkpoint, tmp_path / "artifact", "fp32")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
    plain = {"do_sample": False, "num_beams": 1, "max_new_tokens": STEPS}
    expected = model.generate(torch.tensor(ROWS), attention_mask=torch.tensor(MASK), **plain).tolist()
    assert all(len(set(row)) > 3 for row in expected), "these prompts give one word over and over and prove nothing"
    assert ask(node, "translate", artifact, ids=ROWS, mask=MASK, steps=STEPS) == expected


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False])
def test_text_in_optimum(checkpoints: Checkpoints, merged: bool, tmp_path: Path) -> None:
    artifact = built(checkpoints("t5"), tmp_path / "artifact", "fp32")
    request = {"ids": ROWS, "mask": MASK, "steps": STEPS, "merged": merged}
    printed = in_optimum("optimum_generate.py", artifact, json.dumps(request))
    feeds = {"input_ids": np.array(ROWS[:1]), "attention_mask": np.array(MASK[:1])}
    assert json.loads(printed.splitlines()[-1])[0] == our_tokens(artifact, feeds, 0)[0]


@pytest.mark.client
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_of_the_page(node: Callable[..., str], checkpoints: Checkpoints, name: str, tmp_path: Path) -> None:
    artifact = built(checkpoints("t5"), tmp_path / "t5-onnx", "fp32")
    script = tmp_path / name
    script.write_text(PROGRAMS[name], encoding="utf-8")
    if name.endswith(".mjs"):
        printed = node(script, cwd=tmp_path)
    else:
        done = subprocess.run([sys.executable, name], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    feeds = {"input_ids": np.array(ROWS[:1]), "attention_mask": np.array(MASK[:1])}
    assert json.loads(printed.splitlines()[-1]) == our_tokens(artifact, feeds, 0)[0]


@pytest.mark.client
def test_text_quantized(node: Callable[..., str], checkpoints: Checkpoints, tmp_path: Path) -> None:
    artifact = built(checkpoints("t5"), tmp_path / "artifact", "default")
    feeds = {"input_ids": np.array(ROWS[:1]), "attention_mask": np.array(MASK[:1])}
    expected = our_tokens(artifact, feeds, 0)
    found = ask(node, "translate", artifact, ids=ROWS[:1], mask=MASK[:1], steps=STEPS)
    assert [until_end(row, 1) for row in found] == [until_end(row, 1) for row in expected]


@pytest.mark.client
@pytest.mark.parametrize("kind", ["fp32", "default"])
def test_speech(node: Callable[..., str], checkpoints: Checkpoints, kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    checkpoint = checkpoints("whisper")
    artifact = built(checkpoint, tmp_path / "artifact", kind)
    seconds = np.arange(16000) / 16000
    waveform = (0.4 * np.sin(2 * np.pi * (300 + 200 * seconds) * seconds)).round(4)
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    features = extractor(waveform, sampling_rate=16000, return_tensors="np").input_features
    found = ask(node, "transcribe", artifact, waveform=waveform.tolist(), steps=STEPS)
    if kind == "fp32":
        model = transformers.WhisperForConditionalGeneration.from_pretrained(checkpoint)
        start = model.config.decoder_start_token_id
        ids = torch.tensor([[start]])
        with torch.no_grad():
            for _ in range(STEPS):
                logits = model(input_features=torch.tensor(features), decoder_input_ids=ids).logits
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        expected = ids.tolist()
        assert len(set(expected[0])) > 3
        assert until_end(found[0], 2) == until_end(expected[0], 2)
    else:
        assert_same_up_to_a_tie(artifact, {"input_features": features}, 3, until_end(found[0], 2))


@pytest.mark.client
@pytest.mark.parametrize("architecture", ["vit", "wav2vec2", "clip"])
def test_pixels_and_samples(
    node: Callable[..., str], checkpoints: Checkpoints, architecture: str, tmp_path: Path
) -> None:
    from onnxpress.runtime.sessions import EncoderSession

    artifact = built(checkpoints(architecture), tmp_path / "artifact", "fp32")
    generator = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {"pixel_values": generator.standard_normal((2, 3, 32, 32)).astype(np.float32)}
    if architecture == "wav2vec2":
        feeds = {"input_values": generator.standard_normal((1, 8000)).astype(np.float32)}
    if architecture == "clip":
        feeds |= {"input_ids": np.array(ROWS), "attention_mask": np.array(MASK)}
    expected = EncoderSession(artifact / "onnx" / "model.onnx").run(feeds)
    request = {name: [list(value.shape), value.dtype.name, value.ravel().tolist()] for name, value in feeds.items()}
    found = ask(node, "forward", artifact, feeds=request)
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(np.reshape(found[name], value.shape), value, rtol=1e-4, atol=1e-4)
