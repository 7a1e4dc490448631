"""Every architecture after every reduction: a checkpoint that agrees with the graph, or the reason why there is none.

Both compute the same in float32, in another order: rounding apart, they are equal. How much rounding is, the untouched
model tells: what its graph and torch differ by. Other weights round differently, so 10 times as much is allowed; an
epsilon of the norms that is wrong by a factor of 2 makes 25 to 100 times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.artifact.artifact import Artifact, Source
from onnxpress.artifact.reduced_config import reduced_config
from onnxpress.artifact.structure import Structure, read_structure
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter import architectures, parity
from onnxpress.exporter.export import export
from onnxpress.exporter.reference import TorchReference
from onnxpress.exporter.sources.checkpoint import load_folder
from onnxpress.exporter.writing.placing import place_weights
from onnxpress.exporter.writing.write_checkpoint import write_checkpoint
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.calibrated_pass import CalibratedPass
from onnxpress.optimizers.depth.reduce_depth import ReduceDepth
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.heads.reduce_heads import ReduceHeads
from onnxpress.optimizers.pruning.prune_ffn import PruneFfn
from onnxpress.optimizers.pruning.reduce_hidden import ReduceHidden
from onnxpress.optimizers.pruning.trim_vocabulary import TrimVocabulary
from onnxpress.vocabulary.rewriting import renumbered_config

ROUNDING = 10
LEAST = 1e-6
"""A few units in the last place of numbers around 1: an untouched model may agree better by luck."""
KEPT = np.array([*range(40), *range(50, 120)])

REDUCTIONS: Mapping[str, Callable[[], Pass]] = {
    "prune-ffn": lambda: PruneFfn(ratio=0.5, multiple_of=8, method="l2", refit=False),
    "reduce-depth": lambda: ReduceDepth(keep=0.5),
    "reduce-heads": lambda: ReduceHeads(heads=2, method="slice"),
    "reduce-hidden": lambda: ReduceHidden(ratio=0.5, multiple_of=8, tie=False),
    "trim-vocabulary": lambda: TrimVocabulary(tokens=len(KEPT)),
}
POST_NORM = "bert roberta xlm-roberta distilbert mpnet electra deberta-v2 nomic_bert wav2vec2 bart marian".split()
LAYER_NORM = "gpt2 gpt_neox falcon stablelm starcoder2".split()
DIVIDED = "opt bert roberta xlm-roberta distilbert electra vit wav2vec2 clip gpt2 gpt_neox falcon modernbert".split()
NO_CHECKPOINT: Mapping[tuple[str, str], str] = {
    **{(name, "reduce-heads"): r"takes hidden size / heads for the features of a head: \d+ / 2" for name in DIVIDED},
    **{(name, "reduce-heads"): "QK-norm" for name in ("qwen3", "gemma3_text", "olmo2")},
    **{(name, "reduce-heads"): "not known to be the same for all heads" for name in ("mpnet", "t5", "bloom")},
    **{(name, "reduce-heads"): "stands between .* and attention" for name in ("stablelm", "bart", "marian", "whisper")},
    ("deberta-v2", "reduce-heads"): "read by more than the attention",
    ("bloom", "prune-ffn"): "bloom has no name for feed-forward width",
    **dict.fromkeys([("mixtral", "prune-ffn"), ("qwen2_moe", "prune-ffn")], "experts in the place of a feed-forward"),
    ("deberta-v2", "reduce-depth"): r"query_proj\.weight is shared",
    **{(name, "reduce-hidden"): "read by Add: the gain of the norm can only be folded" for name in POST_NORM},
    **{(name, "reduce-hidden"): f"{name} has LayerNorm where the graph has RMS norm" for name in LAYER_NORM},
    **{(name, "reduce-hidden"): "post-norm" for name in ("gemma2", "gemma3_text", "bloom", "clip")},
    ("olmo2", "reduce-hidden"): "read by GroupQueryAttention",
    **{(name, "reduce-hidden"): "read by Reshape" for name in ("mixtral", "qwen2_moe")},
    ("opt", "reduce-hidden"): "reads the residual stream without a norm",
    ("vit", "reduce-hidden"): "makes a part of the residual stream",
    **{(name, "reduce-hidden"): "read by the model's output" for name in ("modernbert", "t5", "whisper")},
    **{(name, "trim-vocabulary"): "no table is looked up by input_ids" for name in ("vit", "wav2vec2")},
    **{("albert", name): "share|no transformer layers" for name in REDUCTIONS},
}
"""Why there is no checkpoint: the pass refuses the model, or no configuration can say what became of it."""


class Exported(NamedTuple):
    folder: Path
    artifact: Artifact
    rounding: float


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """The tiny model of an architecture, its export, and what this differs from torch by; changes are to its config."""

    @cache
    def make(name: str, **changes: Any) -> Exported:
        folder = tmp_path_factory.mktemp(name)
        model = architectures.tiny_model(name, folder, **changes)
        source = load_folder(folder, Source(name, "huggingface-folder"))
        artifact = export(source, task=architectures.catalog()[name]["task"], remember=False)
        found = parity.differences(artifact, model, tmp_path_factory.mktemp("graphs"))
        return Exported(folder, artifact, max(*found.values(), LEAST))

    return make


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", architectures.architecture_names())
def test_a_checkpoint_or_the_reason_why_not(
    exported: Callable[..., Exported], tmp_path: Path, name: str, reduction: str
) -> None:
    artifact = exported(name).artifact
    reason = NO_CHECKPOINT.get((name, reduction))
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            _reduce(artifact, REDUCTIONS[reduction]())
        return
    _assert_written(exported(name), name, REDUCTIONS[reduction](), tmp_path)


def test_heads_that_merge_are_packed_as_they_were(exported: Callable[..., Exported], tmp_path: Path) -> None:
    """Falcon's keys and values stand behind the queries that share them; heads keep the size that config.json means."""
    merged = ReduceHeads(kv_heads=1, heads=4)
    reduced = _assert_written(exported("falcon"), "falcon", merged, tmp_path)
    assert (reduced.config["num_attention_heads"], reduced.config["num_kv_heads"]) == (4, 1)


def _assert_written(found: Exported, name: str, one: Pass, tmp_path: Path) -> Artifact:
    """Reduce, write a checkpoint, and compare what transformers makes of it."""
    folder, artifact, rounding = found
    before = _structure(artifact)
    reduced = _reduce(artifact, one)
    assert _structure(reduced).parameters < before.parameters
    for part in ("checkpoint", "graphs"):
        (tmp_path / part).mkdir()
    originals = load_folder(folder, Source(name, "huggingface-folder")).tensors
    weights = place_weights(reduced.graphs.values())
    write_checkpoint(tmp_path / "checkpoint", weights, reduced.config, reduced.files, reduced.task, originals=originals)
    model = TorchReference(tmp_path / "checkpoint", task=reduced.task).model
    differences = parity.differences(reduced, model, tmp_path / "graphs")
    assert max(differences.values()) <= ROUNDING * rounding, differences
    return reduced


@pytest.mark.parametrize("name", ["llama", "smollm3"])
def test_a_tied_head_that_mixes_has_no_place(exported: Callable[..., Exported], name: str) -> None:
    """tie=true, the default, puts a product before the head; with tie=false there is a checkpoint."""
    with pytest.raises(UnsupportedModelError, match=rf"{name} has no place for: lm_head\.mixture\.weight"):
        _reduce(exported(name).artifact, ReduceHidden(ratio=0.5, multiple_of=8))


def test_merged_layers_are_recorded(exported: Callable[..., Exported]) -> None:
    merged = _reduce(exported("llama").artifact, ReduceDepth(layers=[2, 3], method="merge"))
    assert merged.config["num_hidden_layers"] == 2
    (layers,) = _structure(merged).stacks.values()
    assert [(layer.origin, layer.merged) for layer in layers] == [(0, ()), (1, (2, 3))]
    again = _reduce(merged, ReduceDepth(layers=[1], method="merge"))
    (layers,) = _structure(again).stacks.values()
    assert [(layer.origin, layer.merged) for layer in layers] == [(0, (1, 2, 3))]


def test_fewer_planes_of_rotation_are_no_series_of_one_theta(exported: Callable[..., Exported]) -> None:
    """Which planes stay is for the samples to say; a configuration has a base, and no list of frequencies."""
    with pytest.raises(UnsupportedModelError, match="planes of RoPE were dropped"):
        _reduce(exported("llama", head_dim=32).artifact, ReduceHeads(head_dim=16))


def test_layers_of_different_widths_are_named(exported: Callable[..., Exported]) -> None:
    one = PruneFfn(ratio=0.5, multiple_of=8, method="l2", refit=False, include=["*.layers.2.*"])
    with pytest.raises(UnsupportedModelError, match="layers differ in feed-forward width: 48, 96"):
        _reduce(exported("llama").artifact, one)


def _reduce(artifact: Artifact, one: Pass) -> Artifact:
    """The artifact after clean-up and a pass, its configuration as the driver makes it follow. Raises
    UnsupportedModelError where the pass does nothing, or where that cannot be said."""
    graphs = {stem: copy_graph(graph) for stem, graph in artifact.graphs.items()}
    reduced = replace(artifact, graphs=graphs)
    skipped: dict[str, int] = {}
    for graph in graphs.values():
        CleanUp()(graph)
    size = read_structure(graphs.values())
    if isinstance(one, TrimVocabulary):
        one.kept = KEPT
        rows = (size.vocabulary if size is not None else None) or len(KEPT) + 1
        reduced = replace(reduced, config=renumbered_config(artifact.config, KEPT, rows))
    matched = 0
    for graph in graphs.values():
        if isinstance(one, CalibratedPass):
            one.calibration = Calibration([_feeds(graph, seed) for seed in range(3)])
        report = one(graph).report
        matched += report.matched.total()
        skipped |= report.skipped
    if not matched:
        raise UnsupportedModelError("; ".join(skipped))
    changed = reduced_config(reduced.config, _structure(artifact), _structure(reduced))
    if changed.onnx_only:
        raise UnsupportedModelError("; ".join(changed.onnx_only))
    return replace(reduced, config=changed.config)


def _structure(artifact: Artifact) -> Structure:
    found = read_structure(artifact.graphs.values())
    assert found is not None
    return found


def _feeds(model: ir.Model, seed: int) -> dict[str, Any]:
    """A prompt of 2 × 12 tokens, or what else a graph reads."""
    random = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        assert value.shape is not None
        shape = [size if isinstance(size, int) else 12 for size in value.shape]
        shape[0] = 2
        if name.startswith("past_key_values"):
            continue
        if "mask" in name:
            feeds[name] = np.ones(shape, np.int64)
        elif name == "position_ids":
            feeds[name] = np.tile(np.arange(12), (2, 1))
        elif name.endswith("ids"):
            feeds[name] = np.zeros(shape, np.int64) if "type" in name else random.integers(5, 39, shape)
        else:
            shape = [2, 4000] if name == "input_values" else shape
            feeds[name] = random.standard_normal(shape).astype(np.float32)
    return feeds
