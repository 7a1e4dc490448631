"""Operators over whole axes: sums, extremes, softmax, normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from onnxpress.exporter.aten.shapes import constant_vector
from onnxpress.exporter.aten.table import aten
from onnxpress.exporter.tracing.recorder import CannotRecord, Recorder


def _axes(r: Recorder, x: Tensor, dims: int | Sequence[int] | None) -> ir.Value | None:
    """Reduce operators' second input: None for all axes."""
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    return r.writer.vector([dim % max(x.dim(), 1) for dim in listed]) if listed else None


def _reduction(op_type: str) -> Callable[..., ir.Value]:
    def translation(
        r: Recorder, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **options: Any
    ) -> ir.Value:
        return r.op(op_type, r.cast(x, out.dtype), _axes(r, x, dim), keepdims=int(keepdim))

    return translation


aten("sum", "sum.dim_IntList")(_reduction("ReduceSum"))
aten("mean", "mean.dim")(_reduction("ReduceMean"))
aten("amax")(_reduction("ReduceMax"))
aten("amin")(_reduction("ReduceMin"))
aten("logsumexp")(_reduction("ReduceLogSumExp"))
aten("prod.dim_int")(_reduction("ReduceProd"))


@aten("max")
def max_all(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.op("ReduceMax", x, keepdims=0)


@aten("min")
def min_all(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.op("ReduceMin", x, keepdims=0)


@aten("max.dim")
def max_dim(r: Recorder, out: Any, x: Tensor, dim: int, keepdim: bool = False) -> list[ir.Value]:
    values = r.op("ReduceMax", x, _axes(r, x, dim), keepdims=int(keepdim))
    return [values, arg_max(r, out[1], x, dim, keepdim)]


@aten("min.dim")
def min_dim(r: Recorder, out: Any, x: Tensor, dim: int, keepdim: bool = False) -> list[ir.Value]:
    values = r.op("ReduceMin", x, _axes(r, x, dim), keepdims=int(keepdim))
    return [values, arg_min(r, out[1], x, dim, keepdim)]


@aten("sort")
def sort(r: Recorder, out: Any, x: Tensor, dim: int = -1, descending: bool = False) -> tuple[ir.Value, ...]:
    axis = dim % max(x.dim(), 1)
    count = r.writer.vector([r.shape(x)[axis]])
    return r.writer.ops("TopK", r.value(x), count, outputs=2, axis=axis, largest=int(descending), sorted=1)


@aten("any", "any.dim", "any.dims")
def any_(r: Recorder, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> ir.Value:
    return _truth(r, "ReduceMax", x, dim, keepdim)


@aten("all", "all.dim", "all.dims")
def all_(r: Recorder, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False) -> ir.Value:
    return _truth(r, "ReduceMin", x, dim, keepdim)


def _truth(r: Recorder, op_type: str, x: Tensor, dim: Any, keepdim: bool) -> ir.Value:
    number = r.cast(r.cast(x, torch.bool), torch.int32)
    reduced = r.op(op_type, number, _axes(r, x, dim), keepdims=int(keepdim))
    return r.op("Cast", reduced, to=ir.DataType.BOOL.value)


@aten("argmax")
def arg_max(r: Recorder, out: Tensor, x: Tensor, dim: int | None = None, keepdim: bool = False) -> ir.Value:
    return _position(r, "ArgMax", x, dim, keepdim)


@aten("argmin")
def arg_min(r: Recorder, out: Tensor, x: Tensor, dim: int | None = None, keepdim: bool = False) -> ir.Value:
    return _position(r, "ArgMin", x, dim, keepdim)


def _position(r: Recorder, op_type: str, x: Tensor, dim: int | None, keepdim: bool) -> ir.Value:
    if dim is None:
        if keepdim:
            raise CannotRecord(f"{op_type} of all elements that keeps their axes")
        flat = r.op("Reshape", x, r.writer.vector([-1]))
        return r.op(op_type, flat, axis=0, keepdims=0)
    return r.op(op_type, x, axis=dim % max(x.dim(), 1), keepdims=int(keepdim))


@aten("cumsum")
def cumulative_sum(r: Recorder, out: Tensor, x: Tensor, dim: int, **options: Any) -> ir.Value:
    return r.op("CumSum", r.cast(x, out.dtype), r.scalar(dim % max(x.dim(), 1), torch.int64))


@aten("var.correction")
def variance(
    r: Recorder, out: Tensor, x: Tensor, dim: Any = None, correction: float | None = None, keepdim: bool = False
) -> ir.Value:
    """Mean square of what differs from the mean, divided by n - correction instead of n (1 by default)."""
    axes = _axes(r, x, dim)
    listed = range(x.dim()) if axes is None else [dim] if isinstance(dim, int) else dim
    counted = 1
    for axis in listed:
        if not isinstance(r.shape(x)[axis], int):
            raise CannotRecord("a variance over a free dimension")
        counted *= x.shape[axis]
    centred = r.op("Sub", x, r.op("ReduceMean", x, axes, keepdims=1))
    mean = r.op("ReduceMean", r.op("Mul", centred, centred), axes, keepdims=int(keepdim))
    factor = counted / (counted - (1 if correction is None else correction))
    return mean if factor == 1 else r.op("Mul", mean, r.scalar(factor, out.dtype))


@aten("_softmax", "softmax.int")
def softmax(r: Recorder, out: Tensor, x: Tensor, dim: int, *options: Any, **more: Any) -> ir.Value:
    return r.op("Softmax", r.cast(x, out.dtype), axis=dim)


@aten("_log_softmax", "log_softmax.int")
def log_softmax(r: Recorder, out: Tensor, x: Tensor, dim: int, *options: Any, **more: Any) -> ir.Value:
    return r.op("LogSoftmax", r.cast(x, out.dtype), axis=dim)


@aten("linalg_vector_norm")
def vector_norm(
    r: Recorder, out: Tensor, x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any
) -> ir.Value:
    if ord not in (1, 2):
        raise CannotRecord(f"a vector norm of order {ord}")
    return r.op(f"ReduceL{int(ord)}", r.cast(x, out.dtype), _axes(r, x, dim), keepdims=int(keepdim))


@aten("native_layer_norm")
def layer_norm(
    r: Recorder, out: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> list[ir.Value | None]:
    scale = weight
    if scale is None:
        if len(shape) != 1:
            raise CannotRecord("a layer norm over several axes without a weight")
        scale = constant_vector(r, 1.0, int(shape[0]))
    normal = r.op("LayerNormalization", x, scale, bias, axis=-len(shape), epsilon=epsilon, stash_type=1)
    return [normal, None, None]


@aten("native_group_norm")
def group_norm(
    r: Recorder,
    out: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Any,
    channels: int,
    size: Any,
    groups: int,
    epsilon: float,
) -> list[ir.Value | None]:
    """Each group is normalised as one instance, then scaled and shifted by channel."""
    spread = [1] * (x.dim() - 2)
    if groups == channels:
        scale = weight if weight is not None else constant_vector(r, 1.0, channels)
        shift = bias if bias is not None else constant_vector(r, 0.0, channels)
        return [r.op("InstanceNormalization", x, scale, shift, epsilon=epsilon), None, None]
    grouped = r.op("Reshape", x, r.writer.vector([0, groups, -1]))
    ones, none = constant_vector(r, 1.0, groups), constant_vector(r, 0.0, groups)
    normal = r.op("InstanceNormalization", grouped, ones, none, epsilon=epsilon)
    value = r.op("Reshape", normal, r.op("Shape", x))
    if weight is not None:
        value = r.op("Mul", value, r.op("Reshape", weight, r.writer.vector([channels, *spread])))
    if bias is not None:
        value = r.op("Add", value, r.op("Reshape", bias, r.writer.vector([channels, *spread])))
    return [value, None, None]


@aten("_native_batch_norm_legit_no_training", "native_batch_norm")
def batch_norm(
    r: Recorder,
    out: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *rest: Any,
) -> list[ir.Value | None]:
    *training, _, epsilon = rest
    if any(training):
        raise CannotRecord("a batch norm that is training")
    channels = int(x.shape[1])
    scale = weight if weight is not None else constant_vector(r, 1.0, channels)
    shift = bias if bias is not None else constant_vector(r, 0.0, channels)
    return [r.op("BatchNormalization", x, scale, shift, mean, variance, epsilon=epsilon), None, None]


@aten("_weight_norm_interface")
def weight_norm(r: Recorder, out: Any, direction: Tensor, size: Tensor, dim: int = 0) -> list[ir.Value | None]:
    axes = [axis for axis in range(direction.dim()) if axis != dim % direction.dim()]
    norm = r.op("ReduceL2", direction, r.writer.vector(axes), keepdims=1)
    return [r.op("Mul", direction, r.op("Div", size, norm)), None]
