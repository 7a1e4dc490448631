"""Sizes of what a graph computes, followed through the operators that shape inference gives up at.

torch's older exporter writes `x.expand(batch, -1, rows, columns)` with sizes that the graph computes, a -1 being found
and replaced by a 1 in the graph, too. onnx's shape inference knows nothing of such a value but its rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.matching import constant, is_op, producer, scalar

Size = int | str
"""A number, or the name of a dimension."""
_UNNAMED = re.compile(r"unk__\d+")
"""Names that onnx's shape inference makes up."""
_BROADCAST = frozenset("Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Sub Where".split())
_SAME = frozenset("Cast Cos Identity IsNaN Neg Not ScatterND Sin Softmax".split())


def size_of(value: ir.Value | None, axis: int) -> Size | None:
    """The size along an axis, counted from the end (negative); 1 beyond the rank, None where it is not known."""
    if value is None:
        return None
    tensor = value.const_value
    if tensor is not None:
        return int(tensor.shape.numpy()[axis]) if len(tensor.shape) >= -axis else 1
    rank = _rank(value)
    if rank is None:
        return None
    if rank < -axis:
        return 1
    size = value.shape[axis] if value.shape is not None else None
    name = size.value if isinstance(size, ir.SymbolicDim) else size
    if isinstance(name, int) or (name is not None and not _UNNAMED.fullmatch(name)):
        return name
    node = value.producer()
    return _computed(node, axis, rank) if node is not None else None


def sizes_in(value: ir.Value | None) -> list[Size | None]:
    """The elements of a vector of sizes, or the one of a scalar; -1 stays -1, and [] means that not even their number
    is known."""
    tensor = constant(value)
    if tensor is not None:
        return [int(size) for size in tensor.numpy().ravel()] if tensor.dtype == ir.DataType.INT64 else []
    node = value.producer() if value is not None else None
    if value is None or node is None or node.domain != "":
        return []
    if node.op_type == "Concat":
        parts = [sizes_in(one) for one in node.inputs]
        return [] if any(not part for part in parts) else [size for part in parts for size in part]
    if node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze"):
        return sizes_in(node.inputs[0])
    if node.op_type == "Shape":
        return _shape(node)
    if node.op_type == "Mul":
        return _products(*(sizes_in(one) for one in node.inputs))
    if node.op_type == "Gather":
        index, found = scalar(node.inputs[1]), sizes_in(node.inputs[0])
        return [found[int(index)]] if index is not None and -len(found) <= int(index) < len(found) else [None]
    given = _without_minus_one(node)
    if given is not None:
        return [1 if size == -1 else size for size in sizes_in(given)]
    if value.shape is None or len(value.shape) > 1:
        return []
    length = value.shape[0] if len(value.shape) else 1
    return [None] * length if isinstance(length, int) else []


def forget_unnamed(graph: ir.Graph) -> None:
    """Remove shapes with sizes that shape inference could not follow, which it would keep when it runs again."""
    for node in graph:
        for value in node.outputs:
            names = [size.value for size in value.shape or () if isinstance(size, ir.SymbolicDim)]
            if any(_UNNAMED.fullmatch(name or "") for name in names) and not value.is_graph_output():
                value.shape = None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _computed(node: ir.Node, axis: int, rank: int) -> Size | None:
    first = node.inputs[0]
    if node.op_type in _SAME or (node.op_type, node.domain) == ("RotaryEmbedding", MICROSOFT):
        return size_of(first, axis)
    if node.domain != "":
        return None
    if node.op_type in _BROADCAST:
        return _broadcast(size_of(one, axis) for one in node.inputs)
    if node.op_type == "MatMul" and axis < -2:
        return _broadcast(size_of(one, axis) for one in node.inputs)
    if node.op_type == "Expand":
        sizes = sizes_in(node.inputs[1])
        if not sizes:
            return None
        return _broadcast([size_of(first, axis), sizes[axis] if len(sizes) >= -axis else 1])
    if node.op_type == "Reshape":
        return _reshaped(node, axis)
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return size_of(first, tuple(node.attributes.get_ints("perm", ()))[axis] - rank)
    if node.op_type in ("Slice", "Unsqueeze") and first is not None:
        return _sliced(node, axis, rank) if node.op_type == "Slice" else _unsqueezed(node, axis, rank)
    return None


def _reshaped(node: ir.Node, axis: int) -> Size | None:
    """The size of a Reshape; -1 is what the sizes before have more than those after."""
    first, target = node.inputs[0], sizes_in(node.inputs[1])
    if first is None or first.shape is None or len(target) < -axis or _zero_is_a_size(node):
        return None
    before = [size_of(first, one) for one in range(-len(first.shape), 0)]
    after = [before[place] if size == 0 and place < len(before) else size for place, size in enumerate(target)]
    if after[axis] != -1:
        return after[axis]
    after.pop(axis)
    names = [sorted(size for size in sizes if isinstance(size, str)) for sizes in (before, after)]
    if None in before or None in after or names[0] != names[1]:
        return None
    numbers = [math.prod(size for size in sizes if isinstance(size, int)) for sizes in (before, after)]
    return numbers[0] // numbers[1] if numbers[1] else None


def _zero_is_a_size(node: ir.Node) -> bool:
    return node.attributes.get_int("allowzero", 0) == 1


def _products(left: list[Size | None], right: list[Size | None]) -> list[Size | None]:
    if len(left) != len(right):
        return []
    pairs = zip(left, right, strict=True)
    return [a * b if isinstance(a, int) and isinstance(b, int) else None for a, b in pairs]


def _sliced(node: ir.Node, axis: int, rank: int) -> Size | None:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if axes is None or any(int(one) in (axis, axis + rank) for one in axes.numpy().ravel()):
        return None
    return size_of(node.inputs[0], axis)


def _unsqueezed(node: ir.Node, axis: int, rank: int) -> Size | None:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return None
    new = sorted((int(one) % rank) - rank for one in axes.numpy().ravel())
    return 1 if axis in new else size_of(node.inputs[0], axis + sum(one > axis for one in new))


def _shape(node: ir.Node) -> list[Size | None]:
    value = node.inputs[0]
    rank = _rank(value) if value is not None else None
    if rank is None:
        return []
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
    return [size_of(value, axis) for axis in range(-rank, 0)][start:end]


def _broadcast(sizes: Iterable[Size | None]) -> Size | None:
    """The size of operands together, as numpy broadcasts: a number above 1 settles it, whatever the others are."""
    found = set(sizes) - {1}
    numbers = [size for size in found if isinstance(size, int)]
    if numbers:
        return numbers[0]
    return 1 if not found else next(iter(found)) if len(found) == 1 else None


def _without_minus_one(node: ir.Node) -> ir.Value | None:
    """v of Where(v == -1, 1, v): the sizes of an expansion that keeps some."""
    test = producer(node.inputs[0], "Equal") if is_op(node, "Where") else None
    if test is None or node.inputs[2] not in test.inputs:
        return None
    other = test.inputs[1] if test.inputs[0] is node.inputs[2] else test.inputs[0]
    return node.inputs[2] if _all(other, -1) and _all(node.inputs[1], 1) else None


def _all(value: ir.Value | None, number: int) -> bool:
    """Whether every element is this number, as a constant or as ones times it."""
    tensor = constant(value)
    if tensor is not None:
        return bool(np.all(tensor.numpy() == number))
    product = producer(value, "Mul")
    if product is not None:
        return any(_all(one, 1) and scalar(other) == number for one, other in (product.inputs, product.inputs[::-1]))
    fill = producer(value, "ConstantOfShape")
    filled = fill.attributes.get("value") if fill is not None else None
    return filled is not None and bool(np.all(filled.value.numpy() == number))
