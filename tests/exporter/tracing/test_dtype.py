"""`--dtype`: what files hold, that it computes what torch does, and what is refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from onnxpress.artifact.artifact import Artifact, Source
from onnxpress.errors import CorruptFileError, OnnxpressError, UnsupportedModelError
from onnxpress.exporter import architectures
from onnxpress.exporter.export import export
from onnxpress.exporter.parity import differences
from onnxpress.exporter.sources.checkpoint import Checkpoint, load_folder
from onnxpress.exporter.tracing.binding import WeightType
from onnxpress.graph.io import load_graph, save_graph

FLOAT, HALF, BRAIN = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16
HEAD = "model.embed_tokens.weight"
UP = "model.layers.2.mlp.up_proj.weight"


def made(architecture: str, folder: Path, dtype: torch.dtype) -> tuple[Checkpoint, Any]:
    """A tiny checkpoint in `dtype`, and its torch model: those weights, in float32."""
    model = architectures.tiny_model(architecture, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    deepcopy(model).to(dtype).save_pretrained(folder)
    return load_folder(folder, Source(architecture, "huggingface-folder")), model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Any]:
    """Its head is tied to the embedding."""
    return made("llama", tmp_path_factory.mktemp("llama"), torch.bfloat16)


def written(artifact: Artifact, folder: Path) -> dict[str, onnx.TensorProto]:
    save_graph(artifact.graphs["model"], folder / "m.onnx", external_data="m.data")
    return {tensor.name: tensor for tensor in onnx.load(folder / "m.onnx").graph.initializer}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_bytes_of_the_checkpoint(dtype: WeightType, llama: tuple[Checkpoint, Any], tmp_path: Path) -> None:
    checkpoint, _ = llama
    artifact = export(checkpoint, dtype=dtype)
    assert artifact.export["dtype"] == dtype
    assert not artifact.export["rounded"]
    tensors = written(artifact, tmp_path)
    names = {name for name, source in checkpoint.tensors.items() if len(source.shape) == 2}
    assert {name for name, tensor in tensors.items() if tensor.data_type == BRAIN} == names
    for name in names:
        assert tensors[name].raw_data == checkpoint.tensors[name].numpy().tobytes(), name
    assert tensors["model.norm.weight"].data_type == FLOAT
    assert "lm_head.weight" not in tensors


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_it_computes_what_torch_does(architecture: str, dtype: WeightType, tmp_path: Path) -> None:
    """float16 holds every bfloat16 of these sizes (0.15 and 0.1 wide) but for the smallest, off by at most 3e-8."""
    checkpoint, model = made(architecture, tmp_path / "checkpoint", torch.bfloat16)
    artifact = export(checkpoint, dtype=dtype)
    found = differences(artifact, model, tmp_path)
    assert max(found.values()) < 1e-4, found
    kinds = {tensor.data_type for path in tmp_path.glob("*.onnx") for tensor in onnx.load(path).graph.initializer}
    assert (BRAIN if dtype == "auto" else HALF) in kinds
    assert artifact.export["rounded"] == (dtype == "float16")


def test_auto_leaves_float32_alone_and_narrower_types_round(tmp_path: Path) -> None:
    checkpoint, _ = made("llama", tmp_path, torch.float32)
    assert {tensor.data_type for tensor in written(export(checkpoint, dtype="auto"), tmp_path).values()} >= {FLOAT}
    for dtype, kind in (("float16", HALF), ("bfloat16", BRAIN)):
        artifact = export(checkpoint, dtype=dtype)  # type: ignore[arg-type]
        assert artifact.export["rounded"]
        tensors = written(artifact, tmp_path)
        values = torch.from_numpy(checkpoint.tensors[UP].numpy()).to(getattr(torch, dtype))
        assert tensors[UP].data_type == kind
        assert tensors[UP].raw_data == values.view(torch.int16).numpy().tobytes()


def test_a_file_of_either_type_is_the_same_graph_to_passes(llama: tuple[Checkpoint, Any], tmp_path: Path) -> None:
    graphs = []
    for dtype in ("float32", "auto"):
        path = tmp_path / f"{dtype}.onnx"
        save_graph(export(llama[0], dtype=dtype).graphs["model"], path, external_data=f"{dtype}.data")  # type: ignore[arg-type]
        graphs.append(load_graph(path))
    texts = []
    for model in graphs:
        for value in model.graph.initializers.values():
            value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)  # type: ignore[union-attr]
        texts.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("dtype", "value"), [("auto", np.nan), ("auto", -np.inf), ("float32", np.inf)])
@pytest.mark.parametrize("name", [HEAD, UP, "model.norm.weight"])
def test_what_is_not_finite_is_refused_by_name(dtype: WeightType, value: float, name: str, tmp_path: Path) -> None:
    checkpoint = _with(name, value, tmp_path)
    with pytest.raises(CorruptFileError, match=rf"weight {name} holds NaN or infinity \(1 of"):
        written(export(checkpoint, dtype=dtype), tmp_path)
    assert not list(tmp_path.glob("m.*"))


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = _with(UP, 1e5, tmp_path)
    written(export(checkpoint, dtype="auto"), tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"Weight '{UP}' does not fit into float16"):
        written(export(checkpoint, dtype="float16"), tmp_path)


def _with(name: str, value: float, folder: Path) -> Checkpoint:
    """A tiny checkpoint in bfloat16, one of whose values is this."""
    model = architectures.tiny_model("llama", folder)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    model.to(torch.bfloat16).save_pretrained(folder)
    return load_folder(folder, Source("llama", "huggingface-folder"))


def test_the_exporter_of_transformers_writes_float32_only(
    llama: tuple[Checkpoint, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxpress.exporter import trace_checkpoint as tracing
    from onnxpress.exporter.layers.export_cache import TracedCheckpoint

    known = TracedCheckpoint(
        "feature-extraction", {"model": ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)}, {}, {"method": "fallback"}
    )
    monkeypatch.setattr(tracing, "trace_checkpoint", lambda *_: known)
    with pytest.raises(OnnxpressError, match="float32 only"):
        export(llama[0], dtype="auto", remember=False)
