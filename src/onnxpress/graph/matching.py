"""Questions that passes ask about a graph: what an operator is, what a constant holds, who reads a value."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> bool:
    return node is not None and node.op_type == op_type and node.domain == domain


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node of this type that computes `value`, if it is one."""
    node = value.producer() if value is not None else None
    return node if is_op(node, op_type, domain) else None


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node; it may be lazy."""
    return ir.convenience.get_const_tensor(value) if value is not None else None


def weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that nobody can feed and that is not an output."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.is_graph_output():
        return None
    return value.const_value


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds."""
    tensor = constant(value)
    if tensor is None or tensor.size != 1 or not np.issubdtype(tensor.dtype.numpy(), np.number):
        return None
    return float(tensor.numpy().reshape(())[()])


def is_close(value: ir.Value | None, number: float) -> bool:
    """Whether a constant scalar is this number, to the precision at which exporters write it."""
    found = scalar(value)
    return found is not None and abs(found - number) <= 2e-4 * abs(number)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, unless others do or the graph returns it."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a binary node."""
    left, right = node.inputs
    return right if left is value else left


def slice_bounds(piece: ir.Node, x: ir.Value) -> tuple[int, int] | None:
    """Start and end of a Slice of the last axis of x, whose size is known; None where it is another or computed."""
    assert x.shape is not None
    size, last = x.shape[-1], len(x.shape) - 1
    tensors = [constant(value) for value in piece.inputs[1:4]]
    if not isinstance(size, int) or len(tensors) != 3 or any(one is None or one.size != 1 for one in tensors):
        return None
    step = constant(piece.inputs[4]) if len(piece.inputs) > 4 else None
    if step is not None and int(step.numpy().reshape(-1)[0]) != 1:
        return None
    start, end, axis = (int(one.numpy().reshape(-1)[0]) for one in tensors if one is not None)
    return (start, min(end, size)) if axis in (-1, last) else None


def same_shape(left: ir.Value, right: ir.Value) -> bool | None:
    """Whether two values have the same shape, dimension names counting as sizes; None when it is not known."""
    if left.shape is None or right.shape is None:
        return None
    if len(left.shape) != len(right.shape):
        return False
    for a, b in zip(left.shape, right.shape, strict=True):
        if isinstance(a, int) and isinstance(b, int):
            if a != b:
                return False
        elif a != b or (isinstance(a, ir.SymbolicDim) and a.value is None):
            return None
    return True
