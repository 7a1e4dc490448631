"""A build of each family of models, end to end: what decoders' tests do not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress import finished, pipeline
from onnxpress.exporter import architectures


@pytest.mark.parametrize("architecture", ["t5", "whisper", "vit", "wav2vec2", "clip", "deberta-v2"])
def test_build(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    architectures.tiny_model(architecture, tmp_path / "checkpoint")
    built = pipeline.build(str(tmp_path / "checkpoint"), output=tmp_path / "artifact", benchmark=False)
    exported = built.steps[0]
    assert exported.name == "export"
    assert exported.metrics["max_difference"] <= architectures.TOLERANCE
    assert any(step.name.startswith("quantize") and step.matched for step in built.steps)
    assert finished.verify(tmp_path / "artifact")
