"""Generation reads the last position's logits only; the others are the dearest product of a prompt, for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Pass

_HEADS = {"MatMul", "Gemm", "MatMulNBits", "FusedMatMul", "DynamicQuantizeMatMul"}
_POINTWISE = {"Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity", "Clip"}
"""What may stand between the head and the output: biases, scales, soft-capping, casts."""


class LastLogits(Pass):
    """Cut the head's input [batch, sequence, hidden] to the newest token: `logits` becomes [batch, 1, vocabulary].

    That is the last one of a row that `attention_mask` attends to, so rows may be padded on either side; without such
    an input it is the last one. Changes the signature: the sequence dimension of `logits` is 1.
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
        inputs = {value.name: value for value in model.graph.inputs}
        builder = _Builder(model, head, f"{self.name}/{self.output}")
        if "input_ids" in inputs and "attention_mask" in inputs:
            last = builder.newest(hidden, inputs["input_ids"], inputs["attention_mask"])
        else:
            last = builder.add("Slice", [hidden, *map(builder.constant, ([-1], [END], [1]))])
        last.type = hidden.type
        if hidden.shape is not None and len(hidden.shape) == 3:
            last.shape = ir.Shape([hidden.shape[0], 1, hidden.shape[2]])
        head.replace_input_with(0, last)
        _forget_shapes(head, logits)
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        report.match(f"{head.op_type} of {self.output}")


def restore_logits(model: ir.Model, output: str = "logits") -> bool:
    """Undo `LastLogits`: `output` has the logits of every position again. False where that pass did not cut them."""
    logits = next((value for value in model.graph.outputs if value.name == output), None)
    head = _head(logits) if logits is not None else None
    cut = head.inputs[0].producer() if head is not None and head.inputs[0] is not None else None
    if logits is None or head is None or cut is None or not (cut.name or "").startswith(f"{LastLogits.name}/{output}/"):
        return False
    head.replace_input_with(0, cut.inputs[0])
    _forget_shapes(head, logits)
    if logits.shape is not None:
        logits.shape = ir.Shape([logits.shape[0], None, logits.shape[2]])
    return True


END = np.iinfo(np.int64).max


@dataclass
class _Builder:
    """Adds nodes before `place`, their names beginning with `prefix`."""

    model: ir.Model
    place: ir.Node
    prefix: str
    count: int = 0

    def newest(self, hidden: ir.Value, ids: ir.Value, mask: ir.Value) -> ir.Value:
        """`hidden` [batch, sequence, n] at the last attended of the new tokens: [batch, 1, n]."""
        length = self.add("Shape", [ids], start=1, end=2)
        fresh = self.add("Slice", [mask, self.add("Neg", [length]), self.constant([END]), self.constant([1])])
        zero, one = self.constant(0), self.constant(1)
        places = self.add("Range", [zero, self.add("Squeeze", [length]), one])
        newest = self.add("ArgMax", [self.add("Mul", [fresh, places])], axis=1, keepdims=1)
        return self.add("GatherND", [hidden, self.add("Unsqueeze", [newest, self.constant([2])])], batch_dims=1)

    def add(self, operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        self.count += 1
        name = f"{self.prefix}/{operator}_{self.count}"
        output = ir.Value(name=name)
        given = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        self.model.graph.insert_before(self.place, ir.Node("", operator, inputs, given, outputs=[output], name=name))
        return output

    def constant(self, value: int | list[int]) -> ir.Value:
        self.count += 1
        name = f"{self.prefix}/constant_{self.count}"
        array = np.array(value, np.int64)
        kind = ir.TensorType(ir.DataType.INT64)
        tensor = ir.tensor(array, name=name)
        constant = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        self.model.graph.register_initializer(constant)
        return constant


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


def _forget_shapes(first: ir.Node, logits: ir.Value) -> None:
    """Values between the head and the output have another sequence length now."""
    pending = [value for value in first.outputs if value is not logits]
    while pending:
        value = pending.pop()
        value.shape = None
        pending += [output for node, _ in value.uses() for output in node.outputs if output is not logits]
