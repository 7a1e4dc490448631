"""Activations that exporters decompose, as one operator.

    x · ½ · (1 + erf(x / √2))                       =>  Gelu
    x · ½ · (1 + tanh(√(2/π) · (x + 0.044715 x³)))  =>  Gelu[approximate="tanh"]
    x · sigmoid(αx), which is SiLU for α = 1        =>  com.microsoft QuickGelu[alpha]

Before opset 20, which has no Gelu, the first two become com.microsoft Gelu and FastGelu. The formula is recognised by
evaluating it at a few points, so that the order and the grouping of its factors do not matter.

Measured, onnxruntime 1.31 on x86 with AVX-512, 1536 wide, one thread, time over that of the decomposed form:

    tokens                                1      128    512
    Gelu (com.microsoft Gelu the same)    0.7    0.4    0.4
    Gelu[tanh] (FastGelu the same)        0.6    0.3    0.3
    QuickGelu, α = 1                      1.0    0.8    0.9
    QuickGelu, α = 1.702                  1.0    1.0    1.0

BiasGelu and FastGelu with a bias were 0.95 to 1.07 times an Add and a Gelu, so that biases are left where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Doubles
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import drop_unused_weights, use_microsoft_operators
from onnxpress.graph.matching import only_reader, same_shape, scalar
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass

POINTS: Doubles = np.linspace(-4, 4, 17)
_erf = np.vectorize(math.erf, otypes=[np.float64])

_EVALUATE: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Erf": _erf,
    "Tanh": np.tanh,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
_DEPTH = 4
"""Operators between the transcendental one and the end of the formula."""


class FuseGelu(Pass):
    """Fuse decomposed Gelu, tanh Gelu, QuickGelu and SiLU."""

    name: ClassVar[str] = "fuse-gelu"

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        for graph in model.graphs():
            for node in list(graph):
                if node.op_type in ("Erf", "Tanh", "Sigmoid") and not node.domain and node.graph is graph:
                    _fuse(model, graph, node, report)


def _fuse(model: ir.Model, graph: ir.Graph, anchor: ir.Node, report: Report) -> None:
    cone = [anchor]
    for _ in range(_DEPTH):
        root = only_reader(cone[-1].outputs[0])
        if root is None or root.op_type not in _EVALUATE or root.domain:
            break
        cone.append(root)
        for value in _candidates(root):
            curve = _evaluate(root.outputs[0], {value: POINTS})
            if curve is None or same_shape(value, root.outputs[0]) is False:  # a constant may add dimensions
                continue
            tolerance = 2e-3 if value.dtype == ir.DataType.FLOAT16 else 2e-5
            fused = _operator(model, anchor.op_type, curve, value, tolerance)
            if fused is not None:
                ir.convenience.replace_nodes_and_values(graph, root, [], [fused], [root.outputs[0]], [fused.outputs[0]])
                _remove_unread(graph, root)
                if fused.domain:
                    use_microsoft_operators(model)
                report.match(fused.op_type)
                return
    if anchor.op_type == "Erf":
        report.skip("Erf outside of a known formula, or with a part that is read elsewhere")


def _candidates(root: ir.Node) -> Iterator[ir.Value]:
    """Values that the formula may be a function of: all that it is computed from, nearest first."""
    seen: dict[ir.Value, None] = {}
    frontier = [root]
    for _ in range(_DEPTH + 3):
        inputs = [value for node in frontier for value in node.inputs if value is not None and scalar(value) is None]
        seen.update(dict.fromkeys(inputs))
        frontier = [node for node in {value.producer() for value in inputs} if node is not None and not node.domain]
        frontier = [node for node in frontier if node.op_type in _EVALUATE]
    yield from seen


def _evaluate(value: ir.Value, known: dict[ir.Value, Doubles], depth: int = 10) -> Doubles | None:
    """`value` as a function of the known one; None if it depends on anything else."""
    if value in known:
        return known[value]
    constant = scalar(value)
    if constant is not None:
        return np.full_like(POINTS, constant)
    node = value.producer()
    if depth == 0 or node is None or node.domain or node.op_type not in _EVALUATE:
        return None
    operands = []
    for operand in node.inputs:
        curve = _evaluate(operand, known, depth - 1) if operand is not None else None
        if curve is None:
            return None
        operands.append(curve)
    with np.errstate(all="ignore"):
        return np.asarray(_EVALUATE[node.op_type](*operands), np.float64)


def _operator(model: ir.Model, anchor: str, curve: Doubles, value: ir.Value, tolerance: float) -> ir.Node | None:
    """The operator that computes this curve from `value`, if there is one."""
    x, opset = POINTS, model.graph.opset_imports.get("", 1)
    if anchor == "Erf":
        if not np.allclose(curve, x * 0.5 * (1 + _erf(x / math.sqrt(2))), atol=tolerance):
            return None
        return ir.node("Gelu", [value], domain="" if opset >= 20 else MICROSOFT)
    if anchor == "Tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        if not np.allclose(curve, x * 0.5 * (1 + np.tanh(inner)), atol=tolerance):
            return None
        if opset >= 20:
            return ir.node("Gelu", [value], {"approximate": "tanh"})
        return ir.node("FastGelu", [value], domain=MICROSOFT)
    gate = curve[-1] / x[-1]  # the sigmoid at the last point, which gives alpha
    at_one = curve[np.flatnonzero(x == 1)[0]]
    if not 0.5 < at_one < 1 or not 0 < gate <= 1:
        return None
    alpha = float(np.round(np.log(at_one / (1 - at_one)), 5))
    if not np.allclose(curve, x / (1 + np.exp(-alpha * x)), atol=tolerance):
        return None
    return ir.node("QuickGelu", [value], {"alpha": alpha}, domain=MICROSOFT)


def _remove_unread(graph: ir.Graph, root: ir.Node) -> None:
    """Remove a node that nothing reads any more, and then what it read."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node.graph is not graph or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        stack += [before for before in node.predecessors() if before.op_type in (*_EVALUATE, "Constant")]
        inputs = list(node.inputs)
        graph.remove(node, safe=True)
        drop_unused_weights(graph, inputs)
