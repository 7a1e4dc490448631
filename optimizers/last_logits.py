"""Generation reads the last position's logits only; the others are the dearest product of a prompt, for nothing."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.optimizers.base import Pass, Report

_HEADS = {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul", "DynamicQuantizeMatMul"}
_POINTWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Clip"}
"""What may stand between the head and the output: biases, scales, soft-capping, casts."""


class LastLogits(Pass):
    """Cut the head's input [batch, sequence, hidden] to its last position: `logits` becomes [batch, 1, vocabulary].

    With left padding, which is what decoders get, the last position is each row's newest token. Changes the signature:
    the sequence dimension of `logits` is 1.
    """

    name: ClassVar[str] = "last-logits"

    def __init__(self, output: str = "logits") -> None:
        """`output`: the graph output to cut."""
        super().__init__()
        self.output = output

    def apply(self, model: ir.Model, report: Report) -> None:
        logits = next((value for value in model.graph.outputs if value.name == self.output), None)
        if logits is None:
            return report.skip(f"no output {self.output}")
        if logits.shape is None or len(logits.shape) != 3:
            return report.skip(f"{self.output} is not [batch, sequence, vocabulary]")
        if logits.shape[1] == 1:
            return report.skip(f"{self.output} has one position already")
        head = _head(logits)
        if head is None:
            return report.skip(f"no product with a constant matrix makes {self.output}")
        hidden = head.inputs[0]
        assert hidden is not None
        last = ir.Value(name=f"{hidden.name}_last", type=hidden.type)
        if hidden.shape is not None and len(hidden.shape) == 3:
            last.shape = ir.Shape([hidden.shape[0], 1, hidden.shape[2]])
        bounds = [_constant(model, f"{hidden.name}_{name}", value) for name, value in _BOUNDS.items()]
        model.graph.insert_before(
            head, ir.Node("", "Slice", [hidden, *bounds], outputs=[last], name=f"{self.name}/{self.output}")
        )
        head.replace_input_with(0, last)
        _forget_shapes(head, logits)
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        report.match(f"{head.op_type} of {self.output}")


_BOUNDS = {"starts": [-1], "ends": [np.iinfo(np.int64).max], "axes": [1], "steps": [1]}


def _head(logits: ir.Value) -> ir.Node | None:
    """The product that makes the logits, if nothing but pointwise operators with constants follows it."""
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _HEADS:
            return node
        varying = [item for item in node.inputs if item is not None and item.const_value is None]
        if node.op_type not in _POINTWISE or len(varying) != 1:
            return None
        value = varying[0]
    return None


def _constant(model: ir.Model, name: str, value: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(value, np.int64), name=name)
    constant = ir.Value(
        name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    model.graph.register_initializer(constant)
    return constant


def _forget_shapes(first: ir.Node, logits: ir.Value) -> None:
    """Values between the head and the output have another sequence length now."""
    pending = [value for value in first.outputs if value is not logits]
    while pending:
        value = pending.pop()
        value.shape = None
        pending += [output for node, _ in value.uses() for output in node.outputs if output is not logits]
