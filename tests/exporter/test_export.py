"""What export promises beyond parity: names, lazy weights, replication, limits, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.artifact.artifact import Artifact, Source
from onnxpress.errors import CorruptFileError, UsageError
from onnxpress.exporter import architectures, decoder
from onnxpress.exporter.export import export
from onnxpress.exporter.fusing import fuse
from onnxpress.exporter.layers import traced
from onnxpress.exporter.sources.checkpoint import Checkpoint, load_folder
from onnxpress.exporter.tracing.binding import bind
from onnxpress.graph.io import save_graph


def checkpoint(architecture: str, folder: Path) -> Checkpoint:
    architectures.tiny_model(architecture, folder)
    return load_folder(folder, Source(architecture, "huggingface-folder"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def artifact(llama: Checkpoint) -> Artifact:
    return export(llama)


def test_names_and_dimensions(artifact: Artifact) -> None:
    graph = artifact.graphs["model"].graph
    described = {value.name: [str(d) for d in value.shape or ()] for value in [*graph.inputs, *graph.outputs]}
    pairs = [f"{layer}.{part}" for layer in range(4) for part in ("key", "value")]
    assert [v.name for v in graph.inputs] == ["input_ids", "attention_mask", *(f"past_key_values.{p}" for p in pairs)]
    assert [v.name for v in graph.outputs] == ["logits", *(f"present.{pair}" for pair in pairs)]
    assert described["input_ids"] == ["batch_size", "sequence_length"]
    assert described["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert described["past_key_values.3.key"] == ["batch_size", "2", "past_sequence_length", "16"]
    assert described["present.0.value"] == ["batch_size", "2", "total_sequence_length", "16"]


def test_initializers_keep_checkpoint_names_and_stay_lazy(artifact: Artifact, llama: Checkpoint) -> None:
    graph = artifact.graphs["model"].graph
    parameters = {name for name in graph.initializers if name.startswith("model.")}
    assert parameters == {name for name in llama.tensors if name.startswith("model.")}
    for name in parameters:
        assert isinstance(graph.initializers[name].const_value, ir.LazyTensor)
    stored = graph.initializers["model.layers.2.mlp.up_proj.weight"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), llama.tensors["model.layers.2.mlp.up_proj.weight"].numpy().T)


def test_tied_embedding_is_stored_once(artifact: Artifact) -> None:
    graph = artifact.graphs["model"].graph
    users = {use.node.op_type for use in graph.initializers["model.embed_tokens.weight"].uses()}
    assert users == {"Gather", "FusedMatMul"}
    assert "lm_head.weight" not in graph.initializers


def test_the_cache_is_never_read_but_by_attention(artifact: Artifact) -> None:
    """A client may hand over a cache that is longer than the past."""
    for value in artifact.graphs["model"].graph.inputs:
        if value.name is not None and value.name.startswith("past_key_values"):
            assert {node.op_type for node in value.consumers()} == {"GroupQueryAttention"}


def test_replicated_is_what_tracing_every_layer_gives(llama: Checkpoint, tmp_path: Path, artifact: Artifact) -> None:
    config = architectures.tiny_config("llama")
    from transformers import LlamaForCausalLM

    shapes = decoder.cache_shapes(traced.on_meta(LlamaForCausalLM, config))

    def wrap(model: object, fusion: fuse.Fusion, layers: tuple[int, ...]) -> traced.Traceable:
        wrapper = decoder.DecoderWrapper(model, fusion, layers).eval()  # type: ignore[arg-type]
        return decoder.traceable_decoder(wrapper, layers, [shapes[layer] for layer in layers])

    plan = traced.Plan(all_layers=True)
    whole = traced._attempt(traced.on_meta(LlamaForCausalLM, config), wrap, plan, 64, "")
    from onnxpress.exporter.sources.parameters import match_parameters

    bind(whole.graph, match_parameters(traced.on_meta(LlamaForCausalLM, config), llama.tensors))
    replicated = artifact.graphs["model"]
    assert len(whole.graph.graph) == len(replicated.graph)
    results = []
    for name, graph in (("whole", whole.graph), ("replicated", replicated)):
        save_graph(graph, tmp_path / f"{name}.onnx")
        session = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
        feeds = {
            value.name: np.zeros((1, 2, 0, 16), np.float32) for value in session.get_inputs() if "past" in value.name
        }
        feeds |= {"input_ids": np.arange(3, 12)[None], "attention_mask": np.ones((1, 9), np.int64)}
        results.append(dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True)))
    for name, expected in results[0].items():
        np.testing.assert_array_equal(results[1][name], expected, err_msg=name)


def test_context_length_sizes_the_tables(llama: Checkpoint) -> None:
    graph = export(llama, context_length=32).graphs["model"].graph
    assert [int(d) for d in graph.initializers["rotary_cos_cache"].shape or ()] == [32, 8]  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="64 positions"):
        export(llama, context_length=128)


def test_tasks_that_do_not_fit_are_refused(llama: Checkpoint) -> None:
    with pytest.raises(UsageError, match="unknown task"):
        export(llama, task="fortune-telling")


def test_missing_parameters_are_named(llama: Checkpoint) -> None:
    tensors = {name: source for name, source in llama.tensors.items() if "layers.2.mlp.up" not in name}
    with pytest.raises(CorruptFileError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        export(replace(llama, tensors=tensors))


def test_nan_weights_are_found_while_writing(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    architectures.tiny_model("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    made = export(load_folder(tmp_path, Source("nan", "huggingface-folder")))
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptFileError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        save_graph(made.graphs["model"], tmp_path / "out" / "model.onnx", external_data="model.onnx_data")
