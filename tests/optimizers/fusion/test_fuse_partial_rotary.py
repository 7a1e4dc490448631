"""Rotary embeddings of the first features of each head, written by hand as torch's older exporter writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.io import copy_graph
from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.fusion.fuse_foreign import FuseForeign
from onnxpress.optimizers.fusion.fuse_partial_rotary import fuse_partial_rotary
from onnxpress.optimizers.heads.reduce_heads import ReduceHeads

HEADS, SIZE, ROTATED = 2, 12, 8
BODY = """
    first = Slice(x, zero, part, last)  rest = Slice(x, part, end, last)
    turned = com.microsoft.RotaryEmbedding<interleaved = 0>(first, positions, cosines, sines)
    y = Concat<axis = -1>(turned, rest)
"""


def rotary_graph(graph: Any, body: str = BODY, heads: str = str(HEADS), outputs: str = "") -> ir.Model:
    angles = np.arange(16, dtype=np.float32)[:, None] * np.array([1, 0.3, 0.1, 0.01], np.float32)
    model: ir.Model = graph(
        f"""g (float[B, {heads}, S, {SIZE}] x, float[B, {heads}, S, {SIZE}] other, int64[B, S] positions,
            float[16, 4] cosines, float[16, 4] sines) => (float[B, {heads}, S, {SIZE}] y{outputs})
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] part = {{{ROTATED}}}, int64[1] later = {{{ROTATED + 1}}},
         int64[1] end = {{9223372036854775807}}, int64[1] last = {{3}}, int64[1] heads_axis = {{1}}> {{ {body} }}""",
        cosines=np.cos(angles),
        sines=np.sin(angles),
    )
    common.ShapeInferencePass()(model)
    value = next(value for node in model.graph for value in node.outputs if value.name == "y")
    value.shape = value.shape or ir.Shape(["B", HEADS, "S", SIZE])
    return model


def test_a_part_of_each_head(graph: Any, run: Any, listing: Any, rng: np.random.Generator) -> None:
    """Positions of left-padded rows differ, and each row keeps its own; what is not rotated stays where it was."""
    model = rotary_graph(graph)
    feeds = {
        **{name: rng.standard_normal((2, HEADS, 5, SIZE), dtype=np.float32) for name in ("x", "other")},
        "positions": np.array([[3, 4, 5, 6, 7], [0, 0, 0, 1, 2]]),
    }
    want = run(model, feeds)[0]
    fuse_partial_rotary(model.graph, report := Report())
    CleanUp()(model)
    assert report.matched == {"rotations of a part of each head": 1}
    assert not report.skipped
    assert listing(model) == (
        f"y = RotaryEmbedding[interleaved=0, num_heads={HEADS}, rotary_embedding_dim={ROTATED}]"
        "(x, positions, cosines, sines)"
    )
    found = run(model, feeds)[0]
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_array_equal(found[..., ROTATED:], feeds["x"][..., ROTATED:])
    assert abs(found[..., :ROTATED] - feeds["x"][..., :ROTATED]).max() > 0.1
    fuse_partial_rotary(model.graph, again := Report())
    assert not again.matched
    assert not again.skipped


NEAR_MISSES = {
    "it is not the first of two parts": ("Concat<axis = -1>(turned, rest)", "Concat<axis = -1>(rest, turned)"),
    "it rotates a part of the part": (
        "<interleaved = 0>",
        "<interleaved = 0, rotary_embedding_dim = 8, num_heads = 2>",
    ),
    "the parts are no slices of one value": ("Slice(x, part, end, last)", "Slice(other, part, end, last)"),
    "the parts are not the first features and the rest": (
        "rest = Slice(x, part, end, last)",
        "tail = Slice(x, later, end, last)  head = Slice(x, zero, one, last)  rest = Slice(x, later, end, last)",
    ),
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_misses(graph: Any, listing: Any, reason: str) -> None:
    model = rotary_graph(graph, BODY.replace(*NEAR_MISSES[reason]))
    before = listing(model)
    fuse_partial_rotary(model.graph, report := Report())
    assert not report.matched
    assert report.skipped == {f"rotary embedding of a part of each head: {reason}": 1}
    assert listing(model) == before


def test_a_rotation_that_others_read(graph: Any) -> None:
    outputs = f", float[B, {HEADS}, S, {ROTATED}] turned"
    fuse_partial_rotary(rotary_graph(graph, outputs=outputs).graph, report := Report())
    assert report.skipped == {"rotary embedding of a part of each head: it is read by others, too": 1}


def test_an_unknown_number_of_heads(graph: Any) -> None:
    """The operator wants to be told."""
    fuse_partial_rotary(rotary_graph(graph, heads="H").graph, report := Report())
    assert report.skipped == {"rotary embedding of a part of each head: number of heads is not known": 1}


def test_a_cache_is_no_part_of_a_head(graph: Any) -> None:
    body = BODY.replace("y = Concat<axis = -1>(turned, rest)", "y = Concat<axis = 2>(turned, first)")
    fuse_partial_rotary(rotary_graph(graph, body).graph, report := Report())
    assert not report.matched
    assert not report.skipped


def test_our_own_stablelm(exported: Any, run: Any) -> None:
    """Its rotation of a part is two operators and two slices: the heads can become fewer once it is one."""
    model = copy_graph(exported("stablelm"))
    given = {
        str(value.name): np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)  # type: ignore[arg-type, index]
        for value in model.graph.inputs
        if str(value.name).startswith("past")
    } | {name: np.arange(7)[None] for name in ("input_ids", "position_ids")}
    given |= {"attention_mask": np.ones((1, 7), np.int64)}
    given = {name: array for name, array in given.items() if name in {value.name for value in model.graph.inputs}}
    want = run(model, given)[0]
    reduction = ReduceHeads(heads=2, method="resample")
    with pytest.raises(UnsupportedModelError, match="Concat stands between") as raised:
        reduction(copy_graph(model))
    assert "--pass fuse-foreign" in str(raised.value.hint)
    assert FuseForeign()(model).report.matched["rotations of a part of each head"] == 8
    np.testing.assert_allclose(run(model, given)[0], want, atol=1e-5)
    assert reduction(model).report.matched == {"4/2 heads × 32 → 2/2 heads × 32": 4}
    less = {name: array[:, :2] if name.startswith("past") else array for name, array in given.items()}
    assert np.isfinite(run(model, less)[0]).all()
