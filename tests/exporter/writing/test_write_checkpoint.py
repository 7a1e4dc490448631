"""Checkpoints written from graphs: the same tensors where nothing changed, the same model where heads and width did."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from onnxpress.artifact.artifact import Artifact, Source
from onnxpress.artifact.reduced_config import reduced_config
from onnxpress.artifact.structure import read_structure
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter import architectures, parity
from onnxpress.exporter.export import export
from onnxpress.exporter.reference import TorchReference
from onnxpress.exporter.sources.checkpoint import load_folder
from onnxpress.exporter.writing.placing import place_weights
from onnxpress.exporter.writing.write_checkpoint import write_checkpoint
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.anatomy.editing import set_bias, set_weight
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.fusion.clean_up import CleanUp

TOLERANCE = 1e-4
"""Of log-probabilities or outputs: rounding in float32 comes to 1e-5."""
Graphs = Mapping[str, ir.Model]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Artifact]]:
    """The folder of a tiny checkpoint and what it was exported to; its graphs are copies."""

    @cache
    def make(name: str) -> tuple[Path, Artifact]:
        folder = tmp_path_factory.mktemp(name)
        architectures.tiny_model(name, folder)
        return folder, _export(folder, name)

    def get(name: str) -> tuple[Path, Artifact]:
        folder, artifact = make(name)
        return folder, replace(artifact, graphs={stem: copy_graph(graph) for stem, graph in artifact.graphs.items()})

    return get


def _export(folder: Path, name: str) -> Artifact:
    checkpoint = load_folder(folder, Source(name, "huggingface-folder"))
    return export(checkpoint, task=architectures.catalog()[name]["task"], remember=False)


def _write(folder: Path, artifact: Artifact, **options: Any) -> None:
    weights = place_weights(artifact.graphs.values())
    write_checkpoint(folder, weights, artifact.config, artifact.files, artifact.task, **options)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen2", "gpt2", "gemma2", "phi3", "opt", "gpt_neox", "mixtral", "distilbert", "t5", "nomic_bert", "vit"],
)
def test_what_did_not_change_is_written_bit_for_bit(
    exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path, name: str
) -> None:
    folder, artifact = exported(name)
    _write(tmp_path, artifact)
    expected, found = _tensors(folder), _tensors(tmp_path)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_what_no_graph_has_is_copied_where_it_is_known(
    exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path
) -> None:
    folder, artifact = exported("bert")
    weights, files = place_weights(artifact.graphs.values()), artifact.files
    for part in ("alone", "copied"):
        (tmp_path / part).mkdir()
    alone = write_checkpoint(tmp_path / "alone", weights, artifact.config, files, artifact.task)
    assert alone.left_out == ("pooler.dense.weight", "pooler.dense.bias")
    originals = load_folder(folder, Source("bert", "huggingface-folder")).tensors
    copied = write_checkpoint(tmp_path / "copied", weights, artifact.config, files, artifact.task, originals=originals)
    assert copied.left_out == ()
    found = _tensors(tmp_path / "copied")
    for key, values in _tensors(folder).items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_gains_whose_arithmetic_was_folded_are_found_by_their_module(
    exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path
) -> None:
    """Gemma stores gains less one; clean-up adds the one and drops the name. 1 + g rounds g to 2^-24."""
    folder, artifact = exported("gemma2")
    CleanUp()(artifact.graphs["model"])
    assert "model.norm.weight" not in artifact.graphs["model"].graph.initializers
    _write(tmp_path, artifact)
    expected, found = _tensors(folder), _tensors(tmp_path)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=0, atol=2**-23, err_msg=key)


def test_shards_and_their_index(exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path) -> None:
    folder, artifact = exported("llama")
    _write(tmp_path, artifact, shard_bytes=100_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(shards)
    assert len(shards) > 3
    assert max(shards.values()) < 105_000
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in _tensors(folder).values())
    loaded = load_folder(tmp_path, Source("x", "huggingface-folder"))
    np.testing.assert_array_equal(loaded.tensors["model.norm.weight"].numpy(), _tensors(folder)["model.norm.weight"])


CUTS = {
    "llama": {"kv_heads": 1, "width": 40},
    "qwen2": {"kv_heads": 1, "width": 40},
    "qwen3": {"width": 40},
    "gemma2": {"kv_heads": 1, "width": 40},
    "granite": {"kv_heads": 1, "width": 40},
    "gpt2": {"width": 100},
    "bert": {"width": 40},
    "distilbert": {"width": 40},
    "t5": {"width": 40},
    "bart": {"width": 40},
}


def _reduced(artifact: Artifact, edit: Callable[[ir.Model], None]) -> Artifact:
    before = read_structure(artifact.graphs.values())
    for graph in artifact.graphs.values():
        edit(graph)
    after = read_structure(artifact.graphs.values())
    assert before is not None
    assert after is not None
    changed = reduced_config(artifact.config, before, after)
    assert changed.onnx_only == []
    return replace(artifact, config=changed.config)


def _check(artifact: Artifact, name: str, tmp_path: Path) -> None:
    """transformers agrees with the graph, and so does what is exported from the checkpoint again."""
    for part in ("checkpoint", "reduced", "again"):
        (tmp_path / part).mkdir()
    _write(tmp_path / "checkpoint", artifact)
    model = TorchReference(tmp_path / "checkpoint", task=artifact.task).model
    found = parity.differences(artifact, model, tmp_path / "reduced")
    assert max(found.values()) < TOLERANCE, found
    again = _export(tmp_path / "checkpoint", name)
    found = parity.differences(again, model, tmp_path / "again")
    assert max(found.values()) < TOLERANCE, found
    for stem, graph in artifact.graphs.items():
        expected = {value.name: value.shape for value in graph.graph.inputs}
        assert {value.name: value.shape for value in again.graphs[stem].graph.inputs} == expected


@pytest.mark.parametrize("name", CUTS)
def test_a_reduced_graph_is_a_model_that_transformers_loads(
    exported: Callable[[str], tuple[Path, Artifact]], cut: Callable[..., None], tmp_path: Path, name: str
) -> None:
    _, artifact = exported(name)
    _check(_reduced(artifact, lambda graph: cut(graph, **CUTS[name])), name, tmp_path)


def test_a_bias_that_the_configuration_can_switch_on(
    exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path
) -> None:
    _, artifact = exported("llama")

    def add(model: ir.Model) -> None:
        for block in anatomy_of(model).blocks:
            assert block.feed_forward is not None
            set_bias(block.feed_forward.down, np.linspace(-1, 1, 64))

    artifact = _reduced(artifact, add)
    assert artifact.config["mlp_bias"] is True
    assert artifact.config["attention_bias"] is False
    _check(artifact, "llama", tmp_path)


def test_weights_without_a_place_are_named(
    exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path, cut: Callable[..., None]
) -> None:
    _, artifact = exported("qwen2")
    model = artifact.graphs["model"]
    block = anatomy_of(model).blocks[1]
    assert block.feed_forward is not None
    set_bias(block.feed_forward.down, np.ones(64))
    with pytest.raises(UnsupportedModelError, match=r"bias model\.layers\.1\.mlp\.down_proj\.bias"):
        _write(tmp_path, artifact)


def test_a_weight_of_another_shape_than_the_configuration_says_is_named(
    exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path, cut: Callable[..., None]
) -> None:
    _, artifact = exported("llama")
    cut(artifact.graphs["model"], width=40)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.gate_proj\.weight is \[40, 64\].*\[96, 64\]"):
        _write(tmp_path, artifact)


def test_a_weight_of_another_shape_is_refused(exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path) -> None:
    """A gain where the architecture has a matrix."""
    _, artifact = exported("llama")
    weights = [one for one in place_weights(artifact.graphs.values()) if "layers.2.mlp.up" not in one.name]
    weights = [replace(one, module="model.layers.2.mlp.up_proj") if "norm" in one.name else one for one in weights]
    message = r"model\.layers\.2\.mlp\.up_proj\.weight is \[64\] in the graph; .* wants \[96, 64\]"
    with pytest.raises(UnsupportedModelError, match=message):
        write_checkpoint(tmp_path, weights, artifact.config, {}, artifact.task)


def test_an_untied_head(exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path) -> None:
    """A head of its own where the embedding was the head, as slicing the hidden size leaves it."""
    _, artifact = exported("llama")

    def untie(model: ir.Model) -> None:
        head = anatomy_of(model).head
        assert head is not None
        table = head.weight.const_value
        assert table is not None
        value = ir.Value(name="head", const_value=ir.tensor(2 * table.numpy(), name="head"))
        value.shape, value.type = table.shape, ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(value)
        head.node.replace_input_with(1, value)

    artifact = _reduced(artifact, untie)
    assert artifact.config["tie_word_embeddings"] is False
    _check(artifact, "llama", tmp_path)
    assert "lm_head.weight" in _tensors(tmp_path / "checkpoint")


def test_set_weights_are_written(exported: Callable[[str], tuple[Path, Artifact]], tmp_path: Path) -> None:
    _, artifact = exported("gpt2")
    down = anatomy_of(artifact.graphs["model"]).blocks[0].products[-1]
    set_weight(down, np.arange(256 * 64, dtype=np.float32).reshape(256, 64))
    _write(tmp_path, artifact)
    expected = np.arange(256 * 64, dtype=np.float32).reshape(256, 64)
    np.testing.assert_array_equal(_tensors(tmp_path)["transformer.h.0.mlp.c_proj.weight"], expected)
