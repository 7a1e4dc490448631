"""Integer weights of products as lazy initializers: codes with a scale per output channel, or one scale for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.graph.edits import add_initializers
from onnxpress.graph.linear import Linear, read_matrix
from onnxpress.graph.tensors import LazyGroup
from onnxpress.optimizers.quantization.maths.channels import (
    WeightType,
    least_weight_scales,
    quantize_bias,
    quantize_channels,
    quantize_tensor,
)


class IntegerWeight(NamedTuple):
    """x · W ≈ x · (codes − zero points) · scales."""

    codes: ir.Value
    """[in, out]"""
    scales: ir.Value
    """[out] float32, or [] for one scale."""
    zero_points: ir.Value
    """Zero points of the codes' type, in the scales' shape."""


class IntegerBias(NamedTuple):
    """b ≈ codes · scales."""

    codes: ir.Value
    """[out] int32"""
    scales: ir.Value
    """[out] or [] float32: the activation's scale times the weight's."""


def whole_names(name: str, weight_type: WeightType) -> list[str]:
    """The names of codes, scale and zero point of a constant with one scale."""
    return [f"{name}.{weight_type}_whole{ending}" for ending in ("", ".scale", ".zero_point")]


def integer_weight(
    graph: ir.Graph, linear: Linear, weight_type: WeightType, *, per_channel: bool = True
) -> IntegerWeight:
    """The weight of a product in 8 bits; initializers of an earlier call are used again."""
    return IntegerWeight(*_initializers(graph, linear, weight_type, per_channel, None))


def integer_weight_and_bias(
    graph: ir.Graph, linear: Linear, weight_type: WeightType, activation_scale: float, *, per_channel: bool = True
) -> tuple[IntegerWeight, IntegerBias]:
    """The same with the bias of the product in 32 bits, for which small weights may get larger scales."""
    values = _initializers(graph, linear, weight_type, per_channel, activation_scale)
    return IntegerWeight(*values[:3]), IntegerBias(*values[3:])


def _initializers(
    graph: ir.Graph, linear: Linear, weight_type: WeightType, per_channel: bool, activation_scale: float | None
) -> list[ir.Value]:
    tensor = linear.weight.const_value
    assert tensor is not None
    features, outputs = linear.shape
    shape = [outputs] if per_channel else []
    integer, number = ir.DataType.INT8 if weight_type == "int8" else ir.DataType.UINT8, ir.DataType.FLOAT
    names = [f"{linear.name}.{weight_type}", f"{linear.name}.scales", f"{linear.name}.zero_points"]
    if not per_channel:
        names = whole_names(linear.name, weight_type)
    specs: list[tuple[ir.DataType, list[int]]] = [(integer, [features, outputs]), (number, shape), (integer, shape)]
    bias = linear.bias.const_value if activation_scale is not None and linear.bias is not None else None
    if bias is not None:
        assert linear.bias is not None
        # The scales depend on the bias and on the activation: nothing else can use this weight.
        names = [f"{name}.{linear.bias.name}" for name in names]
        names += [f"{linear.bias.name}.int32", f"{linear.bias.name}.scales"]
        specs += [(ir.DataType.INT32, [outputs]), (number, shape)]
    quantize: Callable[..., list[NDArray[Any]]] = quantize_channels if per_channel else quantize_tensor

    def compute() -> list[NDArray[Any]]:
        matrix = read_matrix(tensor, linear.name, transpose=linear.transposed)
        if bias is None or activation_scale is None:
            return quantize(matrix, weight_type)
        numbers = np.asarray(bias.numpy(), dtype=np.float32)
        least = least_weight_scales(numbers, activation_scale)
        codes, scales, zero_points = quantize(matrix, weight_type, least if per_channel else float(least.max()))
        biases = quantize_bias(numbers, activation_scale, np.broadcast_to(scales, numbers.shape))
        return [codes, scales, zero_points, biases, np.asarray(scales * np.float32(activation_scale))]

    return add_initializers(graph, names, LazyGroup(compute, specs, working_bytes=3 * tensor.nbytes).tensors)
