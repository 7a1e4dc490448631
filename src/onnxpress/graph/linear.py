"""Products with a constant matrix, however they are written: what quantization passes look for.

MatMul(x, W)                     W [in, out]
MatMul(x, Transpose(W))          W [out, in], as in a head tied to its embedding
Gemm(x, W[, b], transB=0|1)      alpha = beta = 1, transA = 0, b [out]
FusedMatMul(x, W, transB=0|1)    com.microsoft, alpha = 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.floats import require_finite_weight
from onnxpress.graph.report import Report

OFFSETS, OUTLIERS, ROTATION = ".offsets", ".outliers", ".rotation"
"""End the names of what belongs to a larger product: offsets of quantized blocks, the rows of channels that stay in
floating point, the matrix that mixes inputs."""
PARTS = (OFFSETS, OUTLIERS, ROTATION)


@dataclass(frozen=True)
class Linear:
    """y = x · W (+ b), W constant."""

    node: ir.Node
    weight: ir.Value
    """The initializer, [in, out], or [out, in] if `transposed`."""
    transposed: bool
    bias: ir.Value | None = None

    @property
    def activation(self) -> ir.Value:
        """x, as it is by now: what computed it may have been replaced."""
        assert self.node.inputs[0] is not None
        return self.node.inputs[0]

    @property
    def name(self) -> str:
        """The name of the weight, which is what patterns are matched against."""
        assert self.weight.name is not None
        return self.weight.name

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)"""
        rows, columns = matrix_shape(self.weight)
        return (columns, rows) if self.transposed else (rows, columns)


def find_linears(nodes: Iterable[ir.Node], report: Report | None = None) -> Iterator[Linear]:
    """All float32 products with a constant matrix among the nodes of a graph, in their order; those that must be left
    alone go to the report."""
    for node in nodes:
        candidate = match_linear(node)
        if candidate is None:
            continue
        if (candidate.weight.name or "").endswith(PARTS):
            continue
        reason = _obstacle(candidate.weight)
        if reason is None:
            yield candidate
        elif report is not None:
            report.skip(f"{node.op_type}: {reason}")


def chosen_linears(
    nodes: Iterable[ir.Node], report: Report, include: Sequence[str], exclude: Sequence[str], min_features: int
) -> Iterator[Linear]:
    """Those of `find_linears` that a pass is for: of the names meant, with at least `min_features` on both sides."""
    for linear in find_linears(nodes, report):
        if not selected(linear.name, include, exclude):
            report.skip("excluded by name")
        elif min(linear.shape) < min_features:
            report.skip("small")
        else:
            yield linear


def group_by_activation(linears: Iterable[Linear]) -> dict[ir.Value, list[Linear]]:
    """Products that read the same activation together, in the order of the first of each."""
    groups: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.activation, []).append(linear)
    return groups


def match_linear(node: ir.Node) -> Linear | None:
    """A product with an initializer of any type and rank, if the node is one."""
    inputs = node.inputs
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return None
    weight = inputs[1]
    if node.domain == "" and node.op_type == "MatMul":
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose" and producer.domain == "":
            source = producer.inputs[0]
            if source is not None and source.is_initializer() and _ints(producer, "perm") in ((), (1, 0)):
                return Linear(node, source, transposed=True)
            return None
        return Linear(node, weight, transposed=False) if weight.is_initializer() else None
    if not weight.is_initializer():
        return None
    if node.domain == "" and node.op_type == "Gemm":
        plain = _number(node, "alpha", 1.0) == _number(node, "beta", 1.0) == 1.0 and _number(node, "transA", 0) == 0
        bias = inputs[2] if len(inputs) > 2 else None
        transposed = bool(_number(node, "transB", 0))
        linear = Linear(node, weight, transposed, bias)
        if not plain or (bias is not None and (bias.shape is None or list(bias.shape) != [_out_features(linear)])):
            return None
        return linear
    if node.domain == MICROSOFT and node.op_type == "FusedMatMul":
        others = ("transA", "transBatchA", "transBatchB")
        if _number(node, "alpha", 1.0) != 1.0 or any(_number(node, name, 0) for name in others):
            return None
        return Linear(node, weight, bool(_number(node, "transB", 0)))
    return None


def _out_features(linear: Linear) -> int | None:
    shape = linear.weight.shape
    return None if shape is None or len(shape) != 2 else linear.shape[1]


def _obstacle(weight: ir.Value) -> str | None:
    """Why a weight cannot be quantized, if it cannot."""
    if weight.is_graph_input():
        return "weight is a graph input"
    if weight.const_value is None or weight.const_value.dtype != ir.DataType.FLOAT:
        return "weight is not float32"
    if len(weight.const_value.shape) != 2:
        return "weight is not a matrix"
    return None


def matrix_shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.const_value is not None
    rows, columns = (int(size) for size in weight.const_value.shape)  # type: ignore[arg-type]
    return rows, columns


def read_rows(linear: Linear) -> NDArray[np.float32]:
    """The weight as [out, in], read now; onnxpress.errors.CorruptFileError if it holds NaN or infinity."""
    assert linear.weight.const_value is not None
    return read_matrix(linear.weight.const_value, linear.name, transpose=not linear.transposed)


def read_matrix(tensor: ir.TensorProtocol, name: str, *, transpose: bool = False) -> NDArray[np.float32]:
    """A matrix that is about to be quantized, checked to be finite."""
    matrix: NDArray[np.float32] = require_finite_weight(np.asarray(tensor.numpy(), dtype=np.float32), name)
    return np.ascontiguousarray(matrix.T) if transpose else matrix


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a weight is meant: its name fits a pattern of `include` (none: all do) and none of `exclude`."""
    return (not include or any(fnmatchcase(name, pattern) for pattern in include)) and not any(
        fnmatchcase(name, pattern) for pattern in exclude
    )


def is_shared(linear: Linear, linears: Iterable[Linear]) -> bool:
    """Whether anything but these products reads the weight of one of them."""
    products, pending = {one.node for one in linears}, [linear.weight]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return True
        for user, _ in value.uses():
            if user in products:
                continue
            if user.op_type != "Transpose" or value is not linear.weight:
                return True
            pending += user.outputs
    return False


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(int(item) for item in attribute.value)
