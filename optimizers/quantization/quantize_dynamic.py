"""quantize-dynamic: 8-bit weights per output channel, activations quantized while running, integer products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.calibration import NO_SAMPLES, Calibration
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_constant, drop_unused, replace
from onnxpress.graph.linear import Linear, chosen_linears, group_by_activation
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.statistics import TINY
from onnxpress.optimizers.quantization.activation_error import ActivationError
from onnxpress.optimizers.quantization.channel_weights import integer_weight
from onnxpress.optimizers.quantization.maths.channels import WeightType

Activations = Literal["per_tensor", "per_token"]


class QuantizeDynamic(Pass):
    """Replace products with a constant matrix by integer ones.

    per_tensor   one range for all tokens: DynamicQuantizeMatMul, a single node; products that read the same activation
                 share one DynamicQuantizeLinear. A token with outliers coarsens all others of the prompt.
    per_token    a row x is divided by max|x| and rounded to 255 steps; its products are multiplied back. Seven nodes,
                 quantization being shared by products of the same activation. A prompt gives what its tokens give one
                 by one.
    """

    name = "quantize-dynamic"
    exact = False

    def __init__(
        self,
        weight_type: WeightType = "uint8",
        activations: Activations = "per_tensor",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        max_error: float | None = None,
        min_features: int = 32,
        saturates: bool = False,
    ) -> None:
        """
        Args:
            weight_type: `int8` is fast and right where the CPU has VNNI or ARM's dot products; elsewhere on x86 it
                saturates and destroys the output. `uint8` is right everywhere.
            activations: `per_tensor`: one range for all tokens of a prompt, a single node; a token with outliers
                coarsens the others. `per_token`: a range for each token, seven nodes; a prompt gives what its tokens
                give one by one.
            include: patterns of weight names, such as `*.layers.0.*`; products with others are left alone. None: all.
            exclude: patterns of weight names; products with these are left alone, whatever `include` says.
            max_error: leave alone the products of an activation that this quantizes worse: |q(x)·W − x·W|² / |x·W|²,
                averaged over the tokens of sample inputs. quantize-blocks may take them afterwards.
            min_features: products with fewer inputs or outputs are left alone.
            saturates: whether uint8 · int8 products overflow 16 bits on the target's CPU, as on x86 without VNNI; then
                int8 weights are refused. Profiles say it.
        """
        if weight_type == "int8" and saturates:
            raise ValueError("int8 weights overflow on this target's CPU and destroy the output; use uint8")
        self.weight_type = weight_type
        self.activations = activations
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.max_error = max_error
        self.min_features = min_features

    @property
    def needs_samples(self) -> bool:
        return self.max_error is not None

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        groups = group_by_activation(chosen_linears(model.graph, report, self.include, self.exclude, self.min_features))
        if self.needs_samples and not context.calibration.fits(model):
            report.skip(NO_SAMPLES, sum(map(len, groups.values())))
            return
        for activation in self._too_coarse(model, groups, context.calibration):
            report.skip(f"error above {self.max_error:g}", len(groups.pop(activation)))
        for linears in groups.values():
            quantize_siblings(linears, self.weight_type, self.activations)
            report.match(f"{self.weight_type} products, activations {self.activations}", len(linears))
        if report.matched:
            model.opset_imports.setdefault(MICROSOFT, 1)

    def _too_coarse(
        self, model: ir.Model, groups: Mapping[ir.Value, Sequence[Linear]], calibration: Calibration
    ) -> list[ir.Value]:
        """Activations whose quantization costs their products more than `max_error`."""
        if self.max_error is None or not groups:
            return []
        probes = {
            str(value.name): ActivationError(linears, partial(quantize_activation, activations=self.activations))
            for value, linears in groups.items()
        }
        calibration.observe(model, {name: [probe] for name, probe in probes.items()})
        return [value for value in groups if probes[str(value.name)].errors[0] > self.max_error]


def quantize_activation(x: NDArray[np.float32], activations: Activations) -> NDArray[np.float32]:
    """Round an activation [tokens, features] to 8 bits and back, as the kernels do."""
    if activations == "per_token":
        scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), TINY) / np.float32(127)
        return np.asarray(np.rint(x / scale) * scale, dtype=np.float32)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((high - low) / 255 or 1)
    zero_point = np.rint(-low / step)
    return np.asarray((np.clip(np.rint(x / step) + zero_point, 0, 255) - zero_point) * step, dtype=np.float32)


def quantize_siblings(linears: Sequence[Linear], weight_type: WeightType, activations: Activations) -> None:
    """Replace products that read the same activation; the activation is quantized once, before the first of them."""
    graph = linears[0].node.graph
    assert isinstance(graph, ir.Graph)
    if activations == "per_tensor" and len(linears) == 1:
        (linear,) = linears
        inputs = [linear.activation, *integer_weight(graph, linear, weight_type), linear.bias]
        replace(linear.node, _microsoft("DynamicQuantizeMatMul", inputs, linear.node.name))
        drop_unused(graph, linear.weight)
        return
    quantize = _per_tensor if activations == "per_tensor" else _per_token
    codes, scale, zero_point, row_scale = quantize(graph, linears[0])
    for linear in linears:
        weight, weight_scale, weight_zero = integer_weight(graph, linear, weight_type)
        inputs = [codes, weight, scale, weight_scale, zero_point, weight_zero]
        if row_scale is None:
            replace(linear.node, _microsoft("MatMulIntegerToFloat", [*inputs, linear.bias], linear.node.name))
        else:
            product = _microsoft("MatMulIntegerToFloat", inputs, linear.node.name)
            scaled = ir.node("Mul", [product.outputs[0], row_scale])
            biased = [ir.node("Add", [scaled.outputs[0], linear.bias])] if linear.bias is not None else []
            replace(linear.node, product, scaled, *biased)
        drop_unused(graph, linear.weight)


def _per_tensor(graph: ir.Graph, first: Linear) -> tuple[ir.Value, ir.Value, ir.Value, None]:
    """Codes, scale and zero point of an activation, one range for all of it."""
    node = ir.node("DynamicQuantizeLinear", [first.activation], num_outputs=3)
    graph.insert_before(first.node, node)
    codes, scale, zero_point = node.outputs
    return codes, scale, zero_point, None


def _per_token(graph: ir.Graph, first: Linear) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Codes, their constant scale and zero point, and max|x| of each row [..., 1]."""
    nodes, values = quantize_rows(first.activation, lambda name, array: add_constant(graph, f"per_token.{name}", array))
    graph.insert_before(first.node, nodes)
    return values


def quantize_rows(
    activation: ir.Value, constant: Callable[[str, NDArray[Any]], ir.Value]
) -> tuple[list[ir.Node], tuple[ir.Value, ir.Value, ir.Value, ir.Value]]:
    """The nodes, in no graph yet, that quantize each row of an activation by its own largest magnitude.

    Args:
        constant: makes an initializer of a name and an array.

    Returns:
        The nodes; uint8 codes, their constant scale and zero point, and max|x| of each row [..., 1].
    """
    axes, tiny = constant("axes", np.array([-1], np.int64)), constant("tiny", np.array(TINY, np.float32))
    step, middle = constant("step", np.array(1 / 127, np.float32)), constant("zero_point", np.array(128, np.uint8))
    magnitude = ir.node("Abs", [activation])
    largest = ir.node("ReduceMax", [magnitude.outputs[0], axes], {"keepdims": 1})
    row_scale = ir.node("Max", [largest.outputs[0], tiny])
    unit = ir.node("Div", [activation, row_scale.outputs[0]])
    codes = ir.node("QuantizeLinear", [unit.outputs[0], step, middle])
    nodes = [magnitude, largest, row_scale, unit, codes]
    return nodes, (codes.outputs[0], step, middle, row_scale.outputs[0])


def _microsoft(operator: str, inputs: Sequence[ir.Value | None], name: str | None) -> ir.Node:
    """A node of com.microsoft; trailing inputs that are None are left away."""
    trimmed = list(inputs)
    while trimmed[-1] is None:
        trimmed.pop()
    return ir.node(operator, trimmed, domain=MICROSOFT, name=name)
