"""rotate: spread the outliers of an activation over its channels, so that 8 bits per token hold it.

    x · W = (x H) · (Hᵀ W)

H is block-diagonal, a Hadamard matrix (see `quantization.rotation`) for each run of neighbouring channels. Hᵀ W is
computed once; x H is a product by a matrix of 16 × 16, small beside x · W. It is for activations that nothing can be
folded into, such as what down_proj reads: there it lowers the error of int8 activations with a range per token to a
fifth (SmolLM2-135M), about what ranges per block of 64 channels leave, at half of their time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats
from onnxpress.graph.edits import add_constant
from onnxpress.graph.linear import ROTATION, Linear, chosen_linears, group_by_activation, is_shared
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.maths.rotation import hadamard, rotate_channels


class Rotate(Pass):
    """Rotate the inputs of products, and their weights to match; products of one activation share its rotation."""

    name = "rotate"
    exact = True

    def __init__(
        self, size: int = 16, include: Sequence[str] = (), exclude: Sequence[str] = (), min_features: int = 32
    ) -> None:
        """
        Args:
            size: neighbouring channels that a Hadamard matrix mixes, a power of two.
            include: patterns of weight names, such as `*.layers.0.*`; products with others are left alone. None: all.
            exclude: patterns of weight names; products with these are left alone, whatever `include` says.
            min_features: products with fewer inputs or outputs are left alone.
        """
        self.rotation = hadamard(size)
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_features = min_features

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        groups = group_by_activation(chosen_linears(model.graph, report, self.include, self.exclude, self.min_features))
        for activation, linears in groups.items():
            reason = self._obstacle(activation, linears)
            if reason is not None:
                report.skip(reason, len(linears))
                continue
            rotated = self._rotate(model.graph, activation, linears)
            for linear in linears:
                linear.node.replace_input_with(0, rotated)
            for linear in {linear.weight: linear for linear in linears}.values():
                _rotate_weight(linear, self.rotation)
            report.match(f"inputs mixed by {len(self.rotation)}", len(linears))

    def _obstacle(self, activation: ir.Value, linears: Sequence[Linear]) -> str | None:
        if linears[0].shape[0] % len(self.rotation):
            return f"{linears[0].shape[0]} inputs are no multiple of {len(self.rotation)}"
        if activation.shape is None:
            return "inputs are of unknown rank"
        back = activation.producer()
        if back is not None and (back.name or "").endswith(ROTATION):
            return "rotated already"
        return "weight is shared" if any(is_shared(linear, linears) for linear in linears) else None

    def _rotate(self, graph: ir.Graph, activation: ir.Value, linears: Sequence[Linear]) -> ir.Value:
        """The nodes that compute x H, before the first product."""
        assert activation.shape is not None
        features, size, leading = linears[0].shape[0], len(self.rotation), len(activation.shape) - 1
        split, join = (
            add_constant(graph, f"shape{'.'.join(map(str, sizes))}{ROTATION}", np.array(sizes, np.int64))
            for sizes in ([0] * leading + [features // size, size], [0] * leading + [features])
        )
        matrix = add_constant(graph, f"hadamard{size}{ROTATION}", self.rotation)
        runs = ir.node("Reshape", [activation, split], name=f"{activation.name}.runs{ROTATION}")
        mixed = ir.node("MatMul", [runs.outputs[0], matrix], name=f"{activation.name}.mixed{ROTATION}")
        rotated = ir.node("Reshape", [mixed.outputs[0], join], name=f"{activation.name}{ROTATION}")
        value = rotated.outputs[0]
        value.name, value.type, value.shape = rotated.name, activation.type, activation.shape
        graph.insert_before(linears[0].node, [runs, mixed, rotated])
        return value


def _rotate_weight(linear: Linear, rotation: Floats) -> None:
    """Hᵀ W when it is written."""
    tensor = linear.weight.const_value
    assert tensor is not None
    read, shape, size = rows_of(tensor), concrete_shape(tensor), len(rotation)

    def rows(start: int, stop: int) -> Floats:
        if linear.transposed:
            return rotate_channels(np.asarray(read(start, stop), np.float32), rotation)
        low, high = start - start % size, stop + -stop % size
        runs = np.asarray(read(low, high), np.float32).reshape(-1, size, shape[1])
        return np.asarray((rotation @ runs).reshape(-1, shape[1])[start - low : stop - low], dtype=np.float32)

    linear.weight.const_value = RowTensor(rows, ir.DataType.FLOAT, shape, name=linear.name)
