"""Parts of a graph as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.subgraphs import extract_subgraph, session_of

Graph = Callable[..., ir.Model]


def test_a_value_of_undeclared_type_gets_its_own(graph: Graph) -> None:
    """Exporters declare few types; integers that cross from one part to the next must not be taken for floats."""
    model = graph(
        """g (float[B, 8] x, float[8, 8] w) => (float[B, 8] y) {
        h = MatMul(x, w)  size = Shape(h)  wide = Identity(size)  y = Reshape(h, wide) }""",
        w=np.eye(8, dtype=np.float32),
    )
    assert model.graph.node(2).outputs[0].type is None
    part = extract_subgraph(model, {"x": ir.DataType.FLOAT}, ["h", "wide"])
    assert [value.dtype for value in part.graph.outputs] == [ir.DataType.FLOAT, ir.DataType.INT64]
    x = np.ones((3, 8), np.float32)
    with session_of(part) as session:
        hidden, wide = session.run(["h", "wide"], {"x": x})
    np.testing.assert_array_equal(hidden, x)
    assert wide.tolist() == [3, 8]


def test_what_only_a_branch_reads_stays_an_input(graph: Graph) -> None:
    """DeBERTa's layers choose a size by a condition; what the branches read comes from before the part."""
    model = graph(
        """g (float[B] x, bool flag) => (float[B] y) {
        a = Neg(x)
        b = Abs(x)
        c = Identity(flag)
        y = If (c) <then_branch = t () => (float[B] then) { then = Identity(a) },
                    else_branch = e () => (float[B] other) { other = Identity(b) }>
        }"""
    )
    part = extract_subgraph(model, {"a": ir.DataType.FLOAT, "b": ir.DataType.FLOAT, "c": ir.DataType.BOOL}, ["y"])
    x = np.array([1, -2], np.float32)
    with session_of(part) as session:
        (found,) = session.run(None, {"a": -x, "b": abs(x), "c": np.array(False)})
    np.testing.assert_array_equal(found, abs(x))
