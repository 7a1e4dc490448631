"""Matrix products, convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor

from onnxpress.exporter.aten.table import aten
from onnxpress.exporter.tracing.recorder import CannotRecord, Recorder


@aten("mm", "bmm", "mv", "dot")
def matmul(r: Recorder, out: Tensor, x: Tensor, y: Tensor) -> ir.Value:
    return r.op("MatMul", x, y)


@aten("addmm", "baddbmm")
def add_product(
    r: Recorder, out: Tensor, start: Tensor, x: Tensor, y: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> ir.Value:
    """beta · start + alpha · x · y; with beta 0 `start` is ignored, NaN or not."""
    product = _scaled(r, r.op("MatMul", x, y, shape=r.shape(out), dtype=r.dtype(out)), alpha, out)
    return product if beta == 0 else r.op("Add", _scaled(r, r.value(start), beta, start), product)


def _scaled(r: Recorder, value: ir.Value, factor: Any, like: Tensor) -> ir.Value:
    if factor == 1:
        return value
    return r.op("Mul", value, r.scalar(factor, like.dtype), shape=r.shape(like), dtype=r.dtype(like))


@aten("convolution")
def convolution(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> ir.Value:
    axes = x.dim() - 2
    attributes: dict[str, Any] = {
        "strides": _each(stride, axes),
        "pads": _each(padding, axes) * 2,
        "dilations": _each(dilation, axes),
        "group": groups,
        "kernel_shape": [int(size) for size in weight.shape[2:]],
    }
    inputs = [x, weight] if bias is None else [x, weight, bias]
    if transposed:
        return r.op("ConvTranspose", *inputs, output_padding=_each(output_padding, axes), **attributes)
    return r.op("Conv", *inputs, **attributes)


def _each(numbers: Sequence[int], axes: int) -> list[int]:
    """One number for every axis, as torch allows, or one each."""
    listed = [int(number) for number in numbers]
    return listed * axes if len(listed) == 1 else listed


@aten("max_pool2d_with_indices")
def max_pool(
    r: Recorder,
    out: Any,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> list[ir.Value | None]:
    if ceil_mode:
        raise CannotRecord("pooling that rounds sizes up")
    size = _each(kernel, 2)
    attributes = {"strides": _each(stride, 2) or size, "pads": _each(padding, 2) * 2, "dilations": _each(dilation, 2)}
    return [r.op("MaxPool", x, kernel_shape=size, **attributes), None]


@aten("avg_pool2d")
def average_pool(
    r: Recorder,
    out: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ir.Value:
    if ceil_mode or divisor_override is not None:
        raise CannotRecord("pooling that rounds sizes up or has a divisor of its own")
    size = _each(kernel, 2)
    attributes = {"strides": _each(stride, 2) or size, "pads": _each(padding, 2) * 2}
    return r.op("AveragePool", x, kernel_shape=size, count_include_pad=int(count_include_pad), **attributes)
