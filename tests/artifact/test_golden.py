from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxpress.artifact.golden import golden_format, replay_golden, write_golden
from onnxpress.errors import CorruptFileError, SourceNotFoundError, VerificationError

Make = Callable[..., Path]


@pytest.mark.parametrize("last", [False, True])
def test_a_decoder_replays_and_another_does_not(make_decoder: Make, last: bool) -> None:
    path = make_decoder(last=last)
    record = write_golden(path.parent)
    assert record == path.parent / "golden" / "golden.json"
    assert record.stat().st_size < 20_000
    assert replay_golden(path.parent)["max_difference"] < 1e-4
    shutil.copy(make_decoder(last=last, gqa=False), path)
    assert replay_golden(path.parent)["max_difference"] < 0.01
    shutil.copy(make_decoder(last=last, noise=0.05), path)
    with pytest.raises(VerificationError, match=r"differ from the golden ones by \d.*; the tolerance is 0\.02"):
        replay_golden(path.parent)


def test_an_encoder(make_encoder: Make) -> None:
    path = make_encoder()
    write_golden(path.parent)
    assert replay_golden(path.parent)["cosine_min"] == pytest.approx(1)
    shutil.copy(make_encoder(noise=0.3), path)
    with pytest.raises(VerificationError, match="cosine"):
        replay_golden(path.parent)


def test_any_graph_and_its_arrays(tmp_path: Path) -> None:
    shape = "float[1, 3, 64, 64]"
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({shape} pixel_values) => ({shape} y) {{ %s }}'
    onnx.save(onnx.parser.parse_model(text % "y = Tanh(pixel_values)"), tmp_path / "model.onnx")
    write_golden(tmp_path)
    assert np.load(tmp_path / "golden" / "golden.npz")["output:y"].size == 4096
    assert replay_golden(tmp_path)["cosine_min"] == pytest.approx(1)
    onnx.save(onnx.parser.parse_model(text % "y = Cos(pixel_values)"), tmp_path / "model.onnx")
    with pytest.raises(VerificationError):
        replay_golden(tmp_path)
    (tmp_path / "golden" / "golden.npz").write_bytes(b"PK nothing")
    with pytest.raises(CorruptFileError):
        replay_golden(tmp_path)


def test_what_is_missing_or_broken(make_decoder: Make) -> None:
    folder = make_decoder().parent
    with pytest.raises(SourceNotFoundError, match="nothing to replay"):
        replay_golden(folder)
    record = write_golden(folder)
    content = json.loads(record.read_text())
    record.write_text(json.dumps({key: value for key, value in content.items() if key != "expected"}))
    with pytest.raises(CorruptFileError):
        replay_golden(folder)
    record.write_text("{")
    with pytest.raises(CorruptFileError):
        replay_golden(folder)


def test_format_by_file_name() -> None:
    names = ["model.onnx", "model_fp16.onnx", "model_q4.onnx", "decoder_model_quantized.onnx"]
    assert [golden_format(name) for name in names] == ["float32", "float16", "quantized", "quantized"]
