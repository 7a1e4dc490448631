"""Products in which the query, the key and the value of each head stand side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.fusion.decomposed.packed_products import split_packed_heads
from onnxpress.optimizers.heads.column_moves import columns_at
from onnxpress.optimizers.heads.packed import packed_columns

HEADS, SIZE = 2, 4
BODY = """
    shape = Shape(p)  rows = Slice(shape, zero, two)  sizes = Concat<axis = 0>(rows, inner)
    heads = Reshape(p, sizes)  turned = Transpose<perm = [0, 2, 1, 3]>(heads)
    query = Slice(turned, zero, first, last)  key = Slice(turned, first, second, last)
    value = Slice(turned, second, end, last)
"""


def packed_graph(graph: Any, body: str = BODY, inner: int = 3 * SIZE) -> ir.Model:
    outputs = ", ".join(f"float[B, H, S_{name}, D_{name}] {name}" for name in ("query", "key", "value"))
    model: ir.Model = graph(
        f"""g (float[B, S, {HEADS * 3 * SIZE}] p) => ({outputs})
        <int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[2] inner = {{-1, {inner}}}, int64[1] first = {{{SIZE}}},
         int64[1] second = {{{2 * SIZE}}}, int64[1] end = {{9223372036854775807}}, int64[1] last = {{-1}},
         int64[1] odd = {{{SIZE + 1}}}> {{ {body} }}"""
    )
    CleanUp()(model)
    common.ShapeInferencePass()(model)
    return model


def test_three_parts_of_each_head(graph: Any, run: Any, rng: np.random.Generator) -> None:
    model = packed_graph(graph)
    feeds = {"p": rng.standard_normal((2, 5, HEADS * 3 * SIZE), dtype=np.float32)}
    want = run(model, feeds)
    split_packed_heads(model.graph, report := Report())
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    assert report.matched == {"heads packed side by side": 1}
    assert [node.op_type for node in model.graph].count("Split") == 1
    assert "Slice" not in {node.op_type for node in model.graph}
    for found, wanted in zip(run(model, feeds), want, strict=True):
        np.testing.assert_array_equal(found, wanted)
    split_packed_heads(model.graph, again := Report())
    assert not again.matched


def test_columns_can_be_followed(graph: Any) -> None:
    """To whoever edits heads: no size is computed between the product and each part's [batch, length, features]."""
    model = packed_graph(graph)
    split_packed_heads(model.graph, Report())
    wanted = packed_columns((HEADS, HEADS, SIZE), by_group=True)
    for output, columns in zip(model.graph.outputs, wanted, strict=True):
        (transpose,) = [node for node in model.graph if node.outputs[0] is output]
        apart = transpose.inputs[0]
        assert apart is not None
        (reshape,) = [node for node in model.graph if node.outputs[0] is apart]
        found = columns_at(reshape.inputs[0], model.graph.inputs[0], HEADS * 3 * SIZE)
        np.testing.assert_array_equal(found.columns, columns)
        assert list(apart.shape or ())[2:] == [HEADS, SIZE]


NEAR_MISSES = {
    "unequal parts": BODY.replace("first, second", "first, odd").replace("Slice(turned, second", "Slice(turned, odd"),
    "overlapping parts": BODY.replace("Slice(turned, second, end", "Slice(turned, first, second"),
    "halves": BODY.replace("key = Slice(turned, first, second, last)", "key = Abs(query)"),
    "another reader": BODY.replace("value =", "third =")
    + " all = ReduceMax<keepdims = 0>(turned)  value = Add(third, all)",
    "another axis": BODY.replace("last)", "two)"),
    "another order": BODY.replace("[0, 2, 1, 3]", "[0, 1, 2, 3]"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses(graph: Any, listing: Any, case: str) -> None:
    model = packed_graph(graph, NEAR_MISSES[case])
    before = listing(model)
    split_packed_heads(model.graph, report := Report())
    assert not report.matched
    assert listing(model) == before


def test_tokens_that_became_heads(graph: Any, listing: Any) -> None:
    """Rows of the product that are not the rows of its heads: here features of one token become tokens."""
    body = BODY.replace(
        "sizes = Concat<axis = 0>(rows, inner)",
        "some = Slice(shape, zero, one)  sizes = Concat<axis = 0>(some, more, inner)",
    ).replace("inner = {-1", "inner = {1")
    model: ir.Model = graph(
        f"""g (float[B, S, {HEADS * 3 * SIZE}] p) => (float[B, 1, T, {SIZE}] query, float[B, 1, T, {SIZE}] key,
            float[B, 1, T, {SIZE}] value)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] more = {{-1}},
         int64[2] inner = {{1, {3 * SIZE}}}, int64[1] first = {{{SIZE}}}, int64[1] second = {{{2 * SIZE}}},
         int64[1] end = {{9223372036854775807}}, int64[1] last = {{-1}}> {{ {body} }}"""
    )
    CleanUp()(model)
    common.ShapeInferencePass()(model)
    split_packed_heads(model.graph, report := Report())
    assert not report.matched
