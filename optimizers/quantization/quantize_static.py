"""quantize-static: 8-bit weights and activations whose ranges are fixed beforehand, as QDQ.

    y = MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes))

Only standard operators: NPUs and other runtimes take it, and onnxruntime's CPU provider multiplies in integers. A row
gives the same whatever else is in its batch, which ranges found while running do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnxpress.calibration.calibration import NO_SAMPLES, Calibration
from onnxpress.calibration.feeds import token_count
from onnxpress.errors import BadInputError
from onnxpress.graph.linear import Linear, chosen_linears, find_linears, group_by_activation
from onnxpress.graph.matching import weight
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.activation_ranges import (
    METHODS,
    ActivationGrid,
    ActivationType,
    RangeMethod,
    find_grids,
)
from onnxpress.optimizers.quantization.channel_weights import integer_weight, integer_weight_and_bias
from onnxpress.optimizers.quantization.maths.channels import WeightType
from onnxpress.optimizers.quantization.qdq import put_constant, put_weight, through_codes

FEWEST_TOKENS = 64
"""Fewer say next to nothing about a range."""
OPSETS = {"uint8": 13, "int8": 13, "uint16": 21}
"""Where QuantizeLinear takes a type, and axes for weights."""


class QuantizeStatic(Pass):
    """Put QuantizeLinear and DequantizeLinear around products with a constant matrix, and other operators if asked."""

    name = "quantize-static"
    exact = False
    needs_samples = True
    wanted_rows = 64
    wanted_length = 128

    def __init__(
        self,
        activation_type: ActivationType = "uint8",
        weight_type: WeightType = "uint8",
        ranges: RangeMethod | Literal["measured"] = "measured",
        symmetric: bool = False,
        per_channel: bool = True,
        share: float = 99.99,
        max_error: float | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        min_features: int = 32,
        operators: Sequence[str] = (),
        outputs: bool = False,
        saturates: bool = False,
        kernels: Sequence[ActivationType] = get_args(ActivationType),
    ) -> None:
        """
        Args:
            activation_type: codes of activations. `uint16` is for NPUs; onnxruntime's CPU provider multiplies it in
                floating point.
            weight_type: `int8` is fast and right where the CPU has VNNI or ARM's dot products, `uint8` everywhere;
                activations in int8 need weights in int8.
            ranges: how ranges of activations are found on samples. `min_max` clips nothing, `moving_average` is the
                mean of the samples' own ranges, `percentile` clips 100 − `share` percent of the values,
                `mean_squared_error` and `entropy` weigh clipping against steps; `measured` takes the one of these with
                the least error behind the products.
            symmetric: make ranges of activations reach equally far on both sides of zero, zero points in the middle.
            per_channel: a scale for each output channel of a weight; NPUs may want one for all.
            share: for `percentile` the values that it does not clip, in percent.
            max_error: leave alone the products of an activation that this quantizes worse: |q(x)·W − x·W|² / |x·W|²,
                averaged over the tokens of sample inputs.
            include: patterns of weight names, such as `*.layers.0.*`; products with others are left alone. None: all.
            exclude: patterns of weight names; products with these are left alone, whatever `include` says.
            min_features: products with fewer inputs or outputs are left alone.
            operators: types of operators whose inputs are quantized as well: NPUs compute `MatMul` of two activations,
                `Add`, `Mul`, `Softmax`, `LayerNormalization` … on codes. CPUs gain nothing from them.
            outputs: quantize what all these compute, too, so that integers go from one to the next.
            saturates: whether uint8 · int8 products overflow 16 bits on the target's CPU, as on x86 without VNNI; then
                int8 weights are refused. Profiles say it.
            kernels: activation types that the target multiplies in integers; others are refused. Profiles say it.
        """
        if weight_type == "int8" and saturates:
            raise ValueError("int8 weights overflow on this target's CPU and destroy the output; use uint8")
        if activation_type == "int8" and weight_type == "uint8":
            raise ValueError("no kernel multiplies int8 activations by uint8 weights; use int8 for both")
        if activation_type not in kernels:
            raise ValueError(
                f"this target has no kernels for {activation_type} activations and would compute in floating point; "
                f"use {' or '.join(kernels)}"
            )
        if not 0 < share <= 100:
            raise ValueError(f"share must lie in 0 … 100, not {share}")
        self.activation_type: ActivationType = activation_type
        self.weight_type: WeightType = weight_type
        self.methods: Sequence[RangeMethod] = METHODS if ranges == "measured" else (ranges,)
        self.symmetric, self.per_channel, self.share = symmetric, per_channel, share
        self.max_error = max_error
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_features = min_features
        self.operators, self.outputs = frozenset(operators), outputs

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        graph = model.graph
        if (self.operators or self.outputs) and any(value.type is None for node in graph for value in node.outputs):
            ShapeInferencePass()(model)
        linears = self._products(graph, report)
        others = self._others(graph)
        if not linears and not others:
            return
        if not self._has_samples(model, context.calibration, report, len(linears) + len(others)):
            return
        opset = model.opset_imports.get("", 0)
        if opset < OPSETS[self.activation_type]:
            report.skip(f"opset {opset} has no {self.activation_type} codes", len(linears) + len(others))
            return
        readers = group_by_activation(linears)
        for value in self._values(linears, others):
            readers.setdefault(value, [])
        grids = find_grids(
            model,
            context.calibration,
            readers,
            self.methods,
            self.activation_type,
            share=self.share,
            symmetric=self.symmetric,
            measure=self.max_error is not None,
        )
        kept = []
        for linear in linears:
            error = grids[linear.activation].error
            if self.max_error is not None and error is not None and error > self.max_error:
                report.skip(f"error above {self.max_error:g}")
            else:
                kept.append(linear)
            if error is not None:
                report.measure(linear.name, error)
        self._rewrite(graph, kept, others, grids, report)

    def _products(self, graph: ir.Graph, report: Report) -> list[Linear]:
        found = []
        for linear in chosen_linears(graph, report, self.include, self.exclude, self.min_features):
            if linear.node.op_type == "FusedMatMul":
                report.skip("FusedMatMul has no integer form")
            elif linear.bias is not None and weight(linear.bias) is None:
                report.skip("bias is not constant")
            else:
                found.append(linear)
        return found

    def _others(self, graph: ir.Graph) -> list[ir.Node]:
        """Nodes of the wanted types that are not done yet."""
        products = {linear.node for linear in find_linears(graph)}
        return [
            node
            for node in graph
            if node.op_type in self.operators
            and node not in products
            and any(_is_float(value) and weight(value) is None and not _is_done(value) for value in node.inputs)
        ]

    def _has_samples(self, model: ir.Model, calibration: Calibration, report: Report, count: int) -> bool:
        if not calibration.fits(model):
            report.skip(NO_SAMPLES, count)
            return False
        tokens = token_count(calibration.samples)
        if 0 < tokens < FEWEST_TOKENS:
            raise BadInputError(
                f"quantize-static has {tokens} tokens to find ranges with; it needs at least {FEWEST_TOKENS}",
                hint="give more text with --calibration",
            )
        return True

    def _values(self, linears: Sequence[Linear], others: Sequence[ir.Node]) -> list[ir.Value]:
        """The values that are quantized besides the inputs of products."""
        found = [
            value
            for node in others
            for value in node.inputs
            if value is not None and _is_float(value) and weight(value) is None
        ]
        if self.outputs:
            nodes = [*(linear.node for linear in linears), *others]
            found += [value for node in nodes for value in node.outputs[:1] if _is_float(value)]
        return list(dict.fromkeys(found))

    def _rewrite(
        self,
        graph: ir.Graph,
        linears: Sequence[Linear],
        others: Sequence[ir.Node],
        grids: dict[ir.Value, ActivationGrid],
        report: Report,
    ) -> None:
        nodes = [*(linear.node for linear in linears), *others]
        made = {node.outputs[0]: None for node in nodes if node.outputs[0] in grids} if self.outputs else {}
        inputs: dict[ir.Value, list[ir.Node]] = {}
        for node in nodes:
            for value in node.inputs:
                if value is not None and value in grids and value not in made:
                    inputs.setdefault(value, []).append(node)
        activations = {id(linear): linear.activation for linear in linears}
        for value, users in inputs.items():
            through_codes(graph, value, grids[value], users)
        for value in made:
            through_codes(graph, value, grids[value])
        for linear in linears:
            self._put(graph, linear, grids[activations[id(linear)]])
            report.match(f"{self.weight_type} products, {self.activation_type} activations")
        for node in others:
            for position, value in enumerate(node.inputs):
                if value is not None and _is_float(value) and weight(value) is not None:
                    put_constant(graph, node, position, self.weight_type)
            report.match(node.op_type)

    def _put(self, graph: ir.Graph, linear: Linear, grid: ActivationGrid) -> None:
        if linear.bias is None:
            put_weight(linear, integer_weight(graph, linear, self.weight_type, per_channel=self.per_channel), None)
            return
        found, bias = integer_weight_and_bias(
            graph, linear, self.weight_type, float(grid.scale), per_channel=self.per_channel
        )
        put_weight(linear, found, bias)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _is_done(value: ir.Value | None) -> bool:
    """Whether a value is dequantized by now."""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"
