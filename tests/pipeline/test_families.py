"""A build of each family of models, end to end: what decoders' tests do not reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxpress import api, pipeline
from onnxpress.artifact.folder import graph_paths
from onnxpress.evaluation.benchmark import benchmark
from onnxpress.exporter import architectures
from onnxpress.graph.io import load_graph
from onnxpress.graph.tensors import FileTensor
from onnxpress.requests import Judging


@pytest.mark.parametrize("architecture", ["t5", "whisper", "vit", "wav2vec2", "clip", "deberta-v2"])
def test_build(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    architectures.tiny_model(architecture, tmp_path / "checkpoint")
    built = pipeline.build(str(tmp_path / "checkpoint"), output=tmp_path / "artifact", judging=Judging(benchmark=False))
    exported = built.steps[0]
    assert exported.name == "export"
    assert exported.metrics["max_difference"] <= architectures.TOLERANCE
    assert any(step.name.startswith("quantize") and step.matched for step in built.steps)
    assert api.verify(tmp_path / "artifact")


def test_the_decoders_of_an_encoder_decoder_are_merged_and_share_their_weights(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    architectures.tiny_model("t5", tmp_path / "checkpoint")
    pipeline.export(str(tmp_path / "checkpoint"), output=tmp_path / "fp32")
    small = pipeline.optimize(
        str(tmp_path / "fp32"), output=tmp_path / "int8", recipe=["quantize-dynamic"], judging=Judging(benchmark=False)
    )
    assert [step.name for step in small.steps] == ["export", "merge-decoders", "quantize-dynamic", "merge-decoders"]
    assert small.steps[-1].metrics["max_difference"] <= architectures.TOLERANCE
    assert {path.name for path in (tmp_path / "int8" / "onnx").iterdir()} == {
        "encoder_model_quantized.onnx",
        "decoder_model_quantized.onnx",
        "decoder_with_past_model_quantized.onnx",
        "decoder_model_merged_quantized.onnx",
        "decoder_model_merged_quantized.onnx_data",
    }
    graphs = {stem: load_graph(path) for stem, path in graph_paths(tmp_path / "int8").items()}
    operators = {row.operator for row in benchmark(tmp_path / "int8", repeats=1, profile=True).operators}
    assert "MultiHeadAttention" in operators  # of the encoder's session and from inside of the branches
    assert "If" not in operators
    for stem in ("decoder_model", "decoder_with_past_model", "decoder_model_merged"):
        weights = [value.const_value for value in graphs[stem].graph.initializers.values()]
        files = {tensor.path.name for tensor in weights if isinstance(tensor, FileTensor)}
        assert files == {"decoder_model_merged_quantized.onnx_data"}
