"""Parts of a graph as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxpress.optimizers.calibration.subgraphs import extract, session_of

Graph = Callable[..., ir.Model]


def test_a_value_of_undeclared_type_gets_its_own(graph: Graph) -> None:
    """Exporters declare few types; integers that cross from one part to the next must not be taken for floats."""
    model = graph(
        """g (float[B, 8] x, float[8, 8] w) => (float[B, 8] y) {
        h = MatMul(x, w)  size = Shape(h)  wide = Identity(size)  y = Reshape(h, wide) }""",
        w=np.eye(8, dtype=np.float32),
    )
    assert model.graph.node(2).outputs[0].type is None
    part = extract(model, {"x": ir.DataType.FLOAT}, ["h", "wide"])
    assert [value.dtype for value in part.graph.outputs] == [ir.DataType.FLOAT, ir.DataType.INT64]
    x = np.ones((3, 8), np.float32)
    with session_of(part) as session:
        hidden, wide = session.run(["h", "wide"], {"x": x})
    np.testing.assert_array_equal(hidden, x)
    assert wide.tolist() == [3, 8]
