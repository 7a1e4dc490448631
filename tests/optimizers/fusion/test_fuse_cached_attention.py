"""Attention over a cache, written by hand as torch's older exporter writes it for decoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy.editing import decomposed_attention_error
from onnxpress.graph.anatomy.roles import NOT_FUSED
from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.fusion.fuse_attention import fuse_attention

HEADS, SIZE = 4, 8
SPLIT = """
    q4 = Reshape(q, heads)  k4 = Reshape(k, heads)  v4 = Reshape(v, heads)
    qh = Transpose<perm=[0, 2, 1, 3]>(q4)  kh = Transpose<perm=[0, 2, 1, 3]>(k4)  vh = Transpose<perm=[0, 2, 1, 3]>(v4)
    present_key = Concat<axis = -2>(past_key, kh)  present_value = Concat<axis = -2>(past_value, vh)
"""
REPEAT = """
    ks = Shape(present_key)  kb = Gather(ks, first)  kt = Gather(ks, second)
    wide = Concat<axis = 0>(kb, kv, groups, kt, size)  whole = Concat<axis = 0>(kb, all, kt, size)
    k5 = Unsqueeze(present_key, second)  ke = Expand(k5, wide)  kr = Reshape(ke, whole)
    v5 = Unsqueeze(present_value, second)  ve = Expand(v5, wide)  vr = Reshape(ve, whole)
"""
ALONE = "kr = Identity(present_key)  vr = Identity(present_value)"
MASK = """
    ps = Shape(past_key)  past = Gather(ps, two)  rs = Shape(kr)  total = Gather(rs, two)
    rows = Range(past, total, one)  columns = Range(zero, total, one)  column = Unsqueeze(rows, last)
    causal = LessOrEqual(columns, column)  seen = Cast<to = 9>(attention_mask)  seen4 = Unsqueeze(seen, middle)
    visible = And(causal, seen4)  mask = Where(visible, nothing, lowest)
"""
ATTEND = """
    kT = Transpose<perm=[0, 1, 3, 2]>(kr)  raw = MatMul(qh, kT)  scaled = Mul(raw, scale)  masked = Add(scaled, mask)
    p = Softmax(masked)  o = MatMul(p, vr)  t = Transpose<perm=[0, 2, 1, 3]>(o)  y = Reshape(t, merged)
"""


def cached(graph: Any, kv_heads: int, mask: str = MASK, repeat: str = REPEAT, size: int = SIZE) -> ir.Model:
    text = f"""g (int64[B, S] input_ids, float[B, S, {HEADS * size}] q, float[B, S, {kv_heads * size}] k,
        float[B, S, {kv_heads * size}] v, int64[B, T] attention_mask, float[B, {kv_heads}, P, {size}] past_key,
        float[B, {kv_heads}, P, {size}] past_value)
        => (float[B, S, {HEADS * size}] y, float[B, {kv_heads}, T, {size}] present_key,
        float[B, {kv_heads}, T, {size}] present_value)
        <int64[4] heads = {{0, 0, -1, {size}}}, int64[3] merged = {{0, 0, {HEADS * size}}}, float scale = {{0.3}},
         int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64[1] first = {{0}}, int64[1] second = {{2}},
         int64[1] last = {{1}}, int64[2] middle = {{1, 2}}, int64[1] kv = {{{kv_heads}}}, int64[1] size = {{{size}}},
         int64[1] groups = {{{HEADS // kv_heads}}}, int64[1] all = {{{HEADS}}}, float nothing = {{0}},
         float lowest = {{-3.4e38}}> {{ {SPLIT} {repeat} {mask} {ATTEND} }}"""
    model: ir.Model = graph(text)
    common.ShapeInferencePass()(model)
    CleanUp()(model)
    common.ShapeInferencePass()(model)
    return model


def feeds(rng: np.random.Generator, kv_heads: int, visible: Any, past: int, size: int = SIZE) -> dict[str, np.ndarray]:
    mask = np.array(visible)
    batch, length = len(mask), mask.shape[1] - past
    shapes = {name: (batch, length, count * size) for name, count in (("q", HEADS), ("k", kv_heads), ("v", kv_heads))}
    shapes |= dict.fromkeys(("past_key", "past_value"), (batch, kv_heads, past, size))
    made = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**made, "attention_mask": mask, "input_ids": np.zeros((batch, length), np.int64)}


CASES = {
    "a prompt": ([[1] * 5] * 2, 0),
    "padding on the left": ([[0, 0, 1, 1, 1], [1] * 5], 0),
    "padding on the right": ([[1, 1, 1, 0, 0], [1] * 5], 0),
    "a token": ([[0, 1, 1, 1], [1] * 4], 3),
    "tokens": ([[1] * 6], 3),
}
"""Which tokens are there, and how many of them are in the cache."""


@pytest.mark.parametrize(("kv_heads", "operator"), [(2, "GroupQueryAttention"), (4, "MultiHeadAttention")])
def test_a_cache(graph: Any, run: Any, rng: np.random.Generator, kv_heads: int, operator: str) -> None:
    model = cached(graph, kv_heads, repeat=REPEAT if kv_heads < HEADS else ALONE)
    cases = {name: feeds(rng, kv_heads, *case) for name, case in CASES.items()}
    want = {name: run(model, given) for name, given in cases.items()}
    fuse_attention(model, report := Report())
    common.TopologicalSortPass()(model)
    CleanUp()(model)
    assert report.matched == {operator: 1}
    operators = {node.op_type for node in model.graph}
    assert operators.isdisjoint({"Softmax", "MatMul", "Reshape", "Transpose"})  # nothing is repeated or split any more
    for name, given in cases.items():
        output, *cache = run(model, given)
        visible = given["attention_mask"][:, -output.shape[1] :].astype(bool)
        np.testing.assert_allclose(output[visible], want[name][0][visible], atol=1e-5, err_msg=name)
        for found, wanted in zip(cache, want[name][1:], strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_the_bias_is_the_same_for_all_heads(graph: Any) -> None:
    model = cached(graph, 2)
    fuse_attention(model, Report())
    fused = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    bias = fused.inputs[10]
    assert bias is not None
    assert bias.shape is not None
    assert bias.shape[1] == 1


NOT_GROUPED = {
    "its keys are repeated, and its mask shows later tokens": MASK.replace("And(causal, seen4)", "And(seen4, seen4)"),
    "its mask depends on q": MASK.replace(
        "mask = Where", "sum = ReduceSum<keepdims = 0>(q)  nothings = Mul(sum, nothing)  mask = Where"
    ).replace("visible, nothing,", "visible, nothings,"),
    "its mask depends on keys or values": MASK.replace(
        "mask = Where", "sum = ReduceSum<keepdims = 0>(kr)  nothings = Mul(sum, nothing)  mask = Where"
    ).replace("visible, nothing,", "visible, nothings,"),
}


@pytest.mark.parametrize("reason", NOT_GROUPED)
def test_masks_that_the_operator_would_add_to(graph: Any, reason: str) -> None:
    """GroupQueryAttention hides later tokens by itself: what the graph shows would be lost."""
    model = cached(graph, 2, NOT_GROUPED[reason])
    fuse_attention(model, report := Report())
    assert not report.matched
    assert report.skipped == {f"attention: {reason}": 1}
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    assert softmax.metadata_props[NOT_FUSED] == reason
    with pytest.raises(UnsupportedModelError, match="could not be fused: its"):
        raise decomposed_attention_error("layer 0", softmax)


def test_a_window_stays_in_the_mask(graph: Any, run: Any, rng: np.random.Generator) -> None:
    """Causal and more: whatever the graph hides beside later tokens stays hidden."""
    window = MASK.replace(
        "visible = And(causal, seen4)",
        "edge = Sub(column, two)  near = Greater(columns, edge)  both = And(causal, near)  visible = And(both, seen4)",
    )
    model = cached(graph, 2, window)
    given = feeds(rng, 2, [[1] * 7] * 2, 0)
    want = run(model, given)[0]
    fuse_attention(model, report := Report())
    common.TopologicalSortPass()(model)
    assert report.matched == {"GroupQueryAttention": 1}
    np.testing.assert_allclose(run(model, given)[0], want, atol=1e-5)


def test_small_heads_stay_spelled_out(graph: Any) -> None:
    fuse_attention(cached(graph, 2, size=4), report := Report())
    assert report.skipped == {"attention: GroupQueryAttention takes heads of multiples of 8, not 4": 1}


def test_keys_that_change_on_the_way_to_the_cache(graph: Any) -> None:
    """A factor on new keys alone is none on the scores."""
    model = cached(graph, 2)
    concat = next(node for node in model.graph if node.outputs[0].name == "present_key")
    factor = next(value for name, value in model.graph.initializers.items() if name == "scale")
    scaled = ir.node("Mul", [concat.inputs[1], factor])
    model.graph.insert_before(concat, scaled)
    concat.replace_input_with(1, scaled.outputs[0])
    fuse_attention(model, report := Report())
    assert not report.matched
    assert report.skipped == {"attention: keys are not split by Reshape and Transpose, but made by Mul": 1}
