"""Columns that arrive behind movements, against what onnxruntime moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.arrays import Array
from onnxpress.errors import UnsupportedModelError
from onnxpress.optimizers.heads.column_moves import columns_at

Graph = Callable[..., ir.Model]
GROUPS = """
    shape = Constant <value = int64[5] {0, 0, 2, 4, 3}> ()  five = Reshape(x, shape)
    from = Constant <value = int64[1] {0}> ()  to = Constant <value = int64[1] {-2}> ()
    axis = Constant <value = int64[1] {3}> ()  q5 = Slice(five, from, to, axis)
    last = Constant <value = int64 {-1}> ()  v4 = Gather <axis = 3> (five, last)
    flat12 = Constant <value = int64[3] {0, 0, 12}> ()  flat6 = Constant <value = int64[3] {0, 0, -1}> ()
    q = Reshape(q5, flat12)  v = Reshape(v4, flat6)"""
TURNED = """
    shape = Constant <value = int64[4] {0, 0, 3, 8}> ()  four = Reshape(x, shape)
    turned = Transpose <perm = [0, 2, 1, 3]> (four)
    sizes = Constant <value = int64[2] {5, 3}> ()  a, b = Split <axis = -1> (turned, sizes)
    back = Transpose <perm = [0, 2, 1, 3]> (b)  flat = Constant <value = int64[3] {0, 0, 9}> ()
    q = Reshape(back, flat)  v = Reshape(back, flat)"""


def traced(model: ir.Model, name: str) -> Array:
    value = next(output for node in model.graph for output in node.outputs if output.name == name)
    return columns_at(value, model.graph.inputs[0], 24).columns


@pytest.mark.parametrize("body", [GROUPS, TURNED])
def test_columns_are_those_that_onnxruntime_moves(graph: Graph, run: Callable[..., list[Array]], body: str) -> None:
    model = graph(f"g (float[b, s, 24] x) => (float[b, s, n] q, float[b, s, m] v) {{ {body} }}")
    x = np.random.default_rng(0).standard_normal((3, 5, 24), dtype=np.float32)
    for name, expected in zip("qv", run(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(x[..., traced(model, name)], expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("r = Relu(x)  q = Identity(r)", "Identity stands between x and it"),
        ("q = Transpose <perm = [1, 0, 2]> (x)", "features of tokens are mixed between x and q"),
        ("s = Shape(x)  q = Reshape(x, s)", "by sizes that are computed"),
    ],
)
def test_refusals(graph: Graph, body: str, message: str) -> None:
    model = graph(f"g (float[b, s, 24] x) => (float[b, s, n] q) {{ {body} }}")
    with pytest.raises(UnsupportedModelError, match=message):
        traced(model, "q")
