"""The logits of a language model: the product that makes them, and those of all positions where they were cut."""

from __future__ import annotations

import onnx_ir as ir

PREFIX = "last-logits"
"""The pass that cuts them, by which the names of its nodes begin."""
_PRODUCTS = {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul", "DynamicQuantizeMatMul"}
_POINTWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Clip"}
"""Operators that may stand between the head and the output: biases, scales, soft-capping, casts."""


def restore_logits(model: ir.Model, output: str = "logits") -> bool:
    """Undo the pass `last-logits`: `output` has the logits of every position again.

    False where that pass did not cut them.
    """
    logits = next((value for value in model.graph.outputs if value.name == output), None)
    head = head_of(logits) if logits is not None else None
    cut = head.inputs[0].producer() if head is not None and head.inputs[0] is not None else None
    if logits is None or head is None or cut is None or not (cut.name or "").startswith(f"{PREFIX}/{output}/"):
        return False
    head.replace_input_with(0, cut.inputs[0])
    forget_shapes_between(head, logits)
    if logits.shape is not None:
        logits.shape = ir.Shape([logits.shape[0], None, logits.shape[2]])
    return True


def head_of(logits: ir.Value) -> ir.Node | None:
    """The product that makes the logits, if nothing but pointwise operators with constants follows it."""
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _PRODUCTS:
            return node
        varying = [item for item in node.inputs if item is not None and item.const_value is None]
        if node.op_type not in _POINTWISE or len(varying) != 1:
            return None
        value = varying[0]
    return None


def forget_shapes_between(first: ir.Node, logits: ir.Value) -> None:
    """Remove the shapes of values between the head and the output, which have another sequence length now."""
    pending = [value for value in first.outputs if value is not logits]
    while pending:
        value = pending.pop()
        value.shape = None
        pending += [output for node, _ in value.uses() for output in node.outputs if output is not logits]
