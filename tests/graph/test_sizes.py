"""Sizes that the graph computes, as torch's older exporter writes them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.graph.sizes import forget_unnamed, size_of, sizes_in

EXPAND = """g (int64[B, S] mask, float[B, S, 8] x) => (float[N, M, L, K] y)
    <int64 zero = {0}, int64[1] first = {0}, int64[2] middle = {1, 2}, int64[1] minus = {-1}, int64[1] one = {1}> {
    m = Unsqueeze(mask, middle)  shape = Shape(x)  b = Gather(shape, zero)  rows = Unsqueeze(b, first)
    sizes = Concat<axis = 0>(rows, minus, one, minus)
    four = Constant<value_ints = [4]>()  ones = ConstantOfShape<value = int64[1] {1}>(four)  minuses = Mul(ones, minus)
    test = Equal(sizes, minuses)  given = Where(test, ones, sizes)
    e = Expand(m, given)  y = Cast<to = 1>(e) }"""


def value(model: ir.Model, name: str) -> ir.Value:
    return next(output for node in model.graph for output in node.outputs if output.name == name)


def test_an_expansion_with_a_size_that_stays(graph: Any) -> None:
    """onnx knows the rank alone of what is expanded."""
    model = graph(EXPAND)
    common.ShapeInferencePass()(model)
    assert sizes_in(value(model, "sizes")) == ["B", -1, 1, -1]
    assert sizes_in(value(model, "given")) == ["B", 1, 1, 1]
    assert [size_of(value(model, "e"), axis) for axis in (-4, -3, -2, -1)] == ["B", 1, 1, "S"]


def test_an_expansion_to_what_is_not_known(graph: Any) -> None:
    text = EXPAND.replace("float[B, S, 8] x)", "float[B, S, 8] x, int64[4] given)").replace(
        "given = Where(test, ones, sizes)", "unused = Where(test, ones, sizes)"
    )
    model = graph(text)
    common.ShapeInferencePass()(model)
    assert size_of(value(model, "e"), -3) is None


@pytest.mark.parametrize(("target", "heads"), [("minus, four", 2), ("two, minus", 2), ("three, four", 3)])
def test_a_split_into_heads(graph: Any, target: str, heads: int) -> None:
    """-1 is what is left; a size that is given is believed."""
    model = graph(
        f"""g (float[B, S, 8] x) => (float[B, S, H, D] y)
        <int64 zero = {{0}}, int64 one = {{1}}, int64[1] first = {{0}}, int64[1] minus = {{-1}}, int64[1] four = {{4}},
         int64[1] two = {{2}}, int64[1] three = {{3}}> {{
        shape = Shape(x)  b = Gather(shape, zero)  s = Gather(shape, one)  bb = Unsqueeze(b, first)
        ss = Unsqueeze(s, first)  sizes = Concat<axis = 0>(bb, ss, {target})  r = Reshape(x, sizes)
        y = Identity(r) }}"""
    )
    common.ShapeInferencePass()(model)
    forget_unnamed(model.graph)
    found = value(model, "r")
    found.shape = found.shape or ir.Shape([None] * 4)
    assert size_of(found, -2) == heads


def test_a_reshape_whose_names_do_not_cancel(graph: Any) -> None:
    model = graph(
        """g (float[B, S, 8] x) => (float[B, H, D] y) <int64[3] sizes = {0, -1, 4}> {
        r = Reshape(x, sizes)  y = Identity(r) }"""
    )
    value(model, "r").shape = ir.Shape([None] * 3)
    assert [size_of(value(model, "r"), axis) for axis in (-3, -2, -1)] == ["B", None, 4]


def test_broadcasting(graph: Any) -> None:
    model = graph(
        """g (float[B, 1, S] x, float[1, 3, S] y, float[N, M, S] z) => (float[P, Q, R] out) {
        a = Add(x, y)  b = Add(a, z)  out = Identity(b) }"""
    )
    for name in "ab":
        value(model, name).shape = ir.Shape([None] * 3)
    assert [size_of(value(model, "a"), axis) for axis in (-3, -2, -1)] == ["B", 3, "S"]
    assert [size_of(value(model, "b"), axis) for axis in (-3, -2, -1)] == [None, 3, "S"]
