"""Losses of one block after one cut: what the model with that block really cut loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UsageError
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.search import sensitivity
from onnxpress.search.block_cuts import Cut, CutCandidate, check_cuts, find_candidates, linked, numbering
from onnxpress.search.formats import Format, run_part
from onnxpress.search.groups import find_groups, part_model
from onnxpress.search.sensitivity import Measurement, TrialInputs, measure_parts

from .conftest import Exported, lost, samples_of

NARROW = PassSpec("prune-ffn", {"ratio": 0.75, "multiple_of": 1})
HEADS = PassSpec("reduce-heads", {"ratio": 0.5})
CUTS = [Cut("narrow", (NARROW,)), Cut("removed", (PassSpec("reduce-depth", {"drop": 1}),))]
GRAPHS = [("llama", "model"), ("gpt2", "model"), ("bert", "model"), ("t5", "encoder_model"), ("t5", "decoder_model")]


def true_loss(model: ir.Model, candidate: CutCandidate, cut: Cut, samples: TrialInputs) -> float:
    """KL, or 1 − cosine, of the whole model with this block cut."""
    changed = copy_graph(model)
    for _, one in cut.passes_at([candidate], candidate.weights):
        assert one.run(changed, Context(Calibration(samples.fit))).report.matched
    return lost(model, changed, samples)


def by_cut(rows: list[Measurement], candidates: list[CutCandidate]) -> dict[tuple[str, str], Measurement]:
    names = {candidate.name for candidate in candidates}
    return {(row.part, row.format): row for row in rows if row.part in names and row.format != "float32"}


@pytest.mark.parametrize(("name", "stem"), GRAPHS)
def test_losses_are_those_of_the_model_with_that_block_cut(exported: Exported, name: str, stem: str) -> None:
    model = exported(name, stem)
    samples, candidates = samples_of(model), find_candidates(model)
    found = by_cut(measure_parts(model, [], [], samples, others=candidates, cuts=CUTS, session_options={}), candidates)
    assert len(found) == 2 * len(candidates)
    for candidate in candidates:
        for cut in CUTS:
            row = found[candidate.name, cut.name]
            assert row.measured
            # The same float32 model computed in two ways: 1e-6 of logits, squared and summed, is far less than this.
            assert row.loss == pytest.approx(true_loss(model, candidate, cut, samples), rel=0.02, abs=2e-6), (
                candidate,
                cut,
            )


@pytest.mark.parametrize(("name", "width"), [("llama", 32), ("bert", 32), ("gpt2", 3 * 32)])
def test_heads_are_cut_as_channels_are(exported: Exported, name: str, width: int) -> None:
    """A cut of other groups of the block, whose caches and masks go with it."""
    model = exported(name)
    samples, candidates = samples_of(model), find_candidates(model)[:2]
    cuts = [Cut("heads", (HEADS,)), Cut("both", (HEADS, NARROW))]
    found = by_cut(measure_parts(model, [], [], samples, others=candidates, cuts=cuts, session_options={}), candidates)
    assert len(found) == 4
    for (name, cut), row in found.items():
        candidate = next(candidate for candidate in candidates if candidate.name == name)
        expected = true_loss(model, candidate, next(one for one in cuts if one.name == cut), samples)
        assert row.loss == pytest.approx(expected, rel=0.02, abs=2e-6), row
        assert any(shapes[0][1] == width for shapes in row.left.values()), "2 of 4 heads × 16"
        assert len(row.left) == (2 if cut == "heads" else 4)


@pytest.mark.parametrize(("name", "stem"), GRAPHS)
def test_a_block_alone_computes_what_it_computes_in_the_model(exported: Exported, name: str, stem: str) -> None:
    """Its anatomy, too, is that of the block in the model."""
    model = exported(name, stem)
    samples, candidates = samples_of(model), find_candidates(model)
    walk = sensitivity.Walk(model, samples.judge, feed="original")
    steps = {step.title: step for step in walk if step.title == candidates[-1].name}
    assert steps, "the last block is a step of the walk"
    alone = part_model(model, candidates[1])
    (candidate,) = find_candidates(alone)
    assert (candidate.name, candidate.weights, candidate.outputs) == (
        candidates[1].name,
        candidates[1].weights,
        candidates[1].outputs,
    )
    whole = {group.name: group for group in find_groups(model.graph)}
    for group in find_groups(alone.graph):
        if group.name in whole:  # but not where all layers read what an encoder made
            assert set(group.weights) <= set(whole[group.name].weights)


def test_what_is_left_of_units_is_seen_in_the_block(exported: Exported) -> None:
    model = exported("llama")
    samples, candidates, groups = samples_of(model), find_candidates(model), find_groups(model.graph)
    found = by_cut(measure_parts(model, [], [], samples, others=candidates, cuts=CUTS, session_options={}), candidates)
    width = {group.name: group for group in groups}["model.layers.1.mlp.down_proj"].shapes[0][0]
    narrow, removed = (found["model.layers.1", name].left for name in ("narrow", "removed"))
    kept = width * 3 // 4
    assert narrow == {
        "model.layers.1.mlp.gate_proj": [[64, kept], [64, kept]],
        "model.layers.1.mlp.down_proj": [[kept, 64]],
    }
    names = (f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down"))
    assert {group: np.max(shapes) for group, shapes in removed.items()} == dict.fromkeys(names, 0)
    left = linked({"narrow": narrow, "removed": removed}, groups)
    assert sum(group.parameters for group in left["narrow"].values()) == 3 * 64 * kept
    assert sum(group.parameters for group in left["removed"].values()) == 0


def test_a_unit_that_reaches_beyond_a_block_is_not_cut(exported: Exported) -> None:
    """Keys and values of all layers read what the encoder made: one group."""
    model = exported("t5", "decoder_model")
    samples, candidates, groups = samples_of(model), find_candidates(model), find_groups(model.graph)
    rows = by_cut(
        measure_parts(model, [], [], samples, others=candidates, cuts=CUTS[1:], session_options={}), candidates
    )
    left = linked({candidate: row.left for (candidate, _), row in rows.items()}, groups)
    assert all(left.values())
    shared = [group for group in groups if len(group.weights) == 2 * len(candidates)]
    assert len(shared) == 1
    assert not any(shared[0].name in of_one for of_one in left.values())


def test_a_cut_that_finds_nothing_is_not_offered(exported: Exported) -> None:
    model = exported("llama")
    candidates = find_candidates(model)
    whole = Cut("whole", (PassSpec("prune-ffn", {"ratio": 1.0}),))
    masks = Cut("masks", (PassSpec("prune-weights", {"sparsity": 0.5, "method": "magnitude"}),))
    found = measure_parts(model, [], [], samples_of(model), others=candidates, cuts=[whole, masks], session_options={})
    assert by_cut(found, candidates) == {}, "no group gets smaller"


@pytest.mark.parametrize("stem", ["encoder_model", "decoder_model"])
def test_a_cut_that_is_refused_leaves_the_others(exported: Exported, stem: str) -> None:
    """reduce-heads takes neither position biases of each head nor keys and values that another graph reads."""
    model = exported("t5", stem)
    candidates = find_candidates(model)
    cuts = [Cut("heads", (HEADS,)), Cut("narrow", (NARROW,))]
    found = by_cut(
        measure_parts(model, [], [], samples_of(model), others=candidates, cuts=cuts, session_options={}), candidates
    )
    assert set(found) == {(candidate.name, "narrow") for candidate in candidates}


def test_it_goes_on_where_it_was_killed(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported("llama")
    samples, candidates = samples_of(model), find_candidates(model)
    tried: list[str] = []
    real = sensitivity.try_format

    def counted(part: ir.Model, of: CutCandidate, *rest: Any) -> Any:
        if len(tried) == 3:
            raise KeyboardInterrupt
        tried.append(of.name)
        return real(part, of, *rest)

    def measured(formats: list[Format] = []) -> list[Measurement]:  # noqa: B006
        groups = find_groups(model.graph) if formats else []
        return measure_parts(
            model, groups, formats, samples, others=candidates, cuts=CUTS, session_options={}, folder=tmp_path / "kept"
        )

    monkeypatch.setattr(sensitivity, "try_format", counted)
    with pytest.raises(KeyboardInterrupt):
        measured()
    tried.clear()
    monkeypatch.setattr(
        sensitivity, "try_format", lambda part, of, *rest: (tried.append(of.name), real(part, of, *rest))[1]
    )
    rows = measured()
    assert candidates[0].name not in tried
    assert set(tried) == {candidate.name for candidate in candidates[1:]}
    tried.clear()
    assert measured() == rows
    assert tried == []
    measured([Format("8 bits", (PassSpec("quantize-blocks", {"bits": 8, "block_size": 32}),))])
    assert tried, "groups were not measured before"
    assert not set(tried) & {candidate.name for candidate in candidates}


def test_weights_are_named_as_the_cut_model_names_them(exported: Exported) -> None:
    candidates = find_candidates(exported("llama"))
    name = numbering(candidates, [candidates[0], candidates[2]])
    assert name("model.layers.1.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert name("model.layers.3.mlp.up_proj.weight") == "model.layers.1.mlp.up_proj.weight"
    assert name("lm_head.weight") == "lm_head.weight"


def test_removals_are_of_single_blocks() -> None:
    with pytest.raises(UsageError, match="removes single blocks"):
        check_cuts({"two": [PassSpec("reduce-depth", {"drop": 2})]})
    with pytest.raises(UsageError, match="removes single blocks"):
        check_cuts({"both": [NARROW, PassSpec("reduce-depth", {"drop": 1})]})
    assert check_cuts({"one": [PassSpec("reduce-depth", {"drop": 1})]})[0].removes


def test_run_takes_of_samples_what_is_read(exported: Exported) -> None:
    model = exported("bert")
    candidate = find_candidates(model)[0]
    alone = part_model(model, candidate)
    rng = np.random.default_rng(0)
    given: dict[str, NDArray[Any]] = {
        str(value.name): rng.standard_normal((2, 5, 64)).astype(np.float32) for value in alone.graph.inputs[:1]
    }
    (mask,) = alone.graph.inputs[1:] or [None]
    if mask is not None:
        given[str(mask.name)] = np.zeros((2, 1, 5, 5), np.bool_ if mask.dtype == ir.DataType.BOOL else np.float32)
    (found,) = run_part(alone, [given | {"surplus": np.zeros(1)}], {}).outputs
    assert set(found) == set(candidate.outputs)
