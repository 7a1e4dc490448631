"""transformers' own exporter, for what cannot be traced our way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxpress.artifact.artifact import Artifact, Source
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter import architectures, fallback, parity, tasks
from onnxpress.exporter import trace_checkpoint as tracing
from onnxpress.exporter.export import export
from onnxpress.exporter.sources.checkpoint import load_folder


def test_unfused_export_agrees_with_torch(tmp_path: Path) -> None:
    model = architectures.tiny_model("bert", tmp_path)
    checkpoint = load_folder(tmp_path, Source("bert", "huggingface-folder"))
    graph = fallback.export_unfused(
        tasks.model_class(model.config, "feature-extraction"),
        model.config,
        "feature-extraction",
        checkpoint.tensors,
        "a test asks for it",
    )
    assert [value.name for value in graph.graph.outputs] == ["last_hidden_state"]
    assert "MultiHeadAttention" not in {node.op_type for node in graph.graph}
    artifact = Artifact("feature-extraction", {"model": graph}, {}, {}, checkpoint.source)
    assert max(parity.differences(artifact, model, tmp_path).values()) <= architectures.TOLERANCE


def test_export_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures.tiny_model("bert", tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("this trace fails\nwith pages of diagnosis")

    monkeypatch.setattr(tracing, "export_encoder", fail)
    made = export(
        load_folder(tmp_path, Source("bert", "huggingface-folder")), task="feature-extraction", remember=False
    )
    assert made.export["method"] == "fallback"
    assert made.export["not_fused"] == {"template": "this trace fails"}


def test_a_decoder_that_cannot_be_traced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures.tiny_model("llama", tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("this trace fails")

    monkeypatch.setattr(tracing, "export_decoder", fail)
    with pytest.raises(UnsupportedModelError, match="this trace fails"):
        export(load_folder(tmp_path, Source("llama", "huggingface-folder")), remember=False)
