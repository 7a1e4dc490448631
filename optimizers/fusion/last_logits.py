"""Generation reads the last position's logits only; the others are the dearest product of a prompt, for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.graph.logits import PREFIX, forget_shapes_between, head_of
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass


class LastLogits(Pass):
    """Cut the head's input [batch, sequence, hidden] to the newest token: `logits` becomes [batch, 1, vocabulary].

    That is the last one of a row that `attention_mask` attends to, so rows may be padded on either side; without such
    an input it is the last one. Changes the signature: the sequence dimension of `logits` is 1.
    """

    name: ClassVar[str] = PREFIX

    def __init__(self, output: str = "logits") -> None:
        """
        Args:
            output: name of the graph output to cut, [batch, sequence, vocabulary].
        """
        super().__init__()
        self.output = output

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        logits = next((value for value in model.graph.outputs if value.name == self.output), None)
        if logits is None:
            return report.skip(f"no output {self.output}")
        if logits.shape is None or len(logits.shape) != 3:
            return report.skip(f"{self.output} is not [batch, sequence, vocabulary]")
        if logits.shape[1] == 1:
            return report.skip(f"{self.output} has one position already")
        head = head_of(logits)
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
        forget_shapes_between(head, logits)
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        report.match(f"{head.op_type} of {self.output}")


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
