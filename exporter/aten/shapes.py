"""Operators that move, repeat, pick or create elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxpress.exporter.aten.elementwise import operand
from onnxpress.exporter.aten.table import aten
from onnxpress.exporter.tracing.recorder import CannotRecord, Recorder

Size: TypeAlias = "int | torch.SymInt"
LAST = (1 << 63) - 1
"""To the end, as torch and ONNX write it."""


@aten("view", "_unsafe_view", "reshape", "view_copy", "_reshape_alias")
def view(r: Recorder, out: Tensor, x: Tensor, *rest: Any) -> ir.Value:
    if out.dtype != x.dtype:
        raise CannotRecord("a view as another type")
    return r.reshape(x, out)


@aten("unsqueeze")
def unsqueeze(r: Recorder, out: Tensor, x: Tensor, dim: int) -> ir.Value:
    return r.op("Unsqueeze", x, r.writer.vector([dim % out.dim()]))


@aten("squeeze.dim", "squeeze.dims")
def squeeze(r: Recorder, out: Tensor, x: Tensor, dims: int | Sequence[int]) -> ir.Value:
    """Axes of a size that is not always 1 stay, as torch decides while recording."""
    wanted = [dims] if isinstance(dims, int) else dims
    axes = [axis % x.dim() for axis in wanted if r.shape(x)[axis] == 1] if x.dim() else []
    return r.op("Squeeze", x, r.writer.vector(axes)) if axes else r.value(x)


@aten("squeeze")
def squeeze_all(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return squeeze(r, out, x, range(x.dim()))


@aten("permute")
def permute(r: Recorder, out: Tensor, x: Tensor, dims: Sequence[int]) -> ir.Value:
    return r.transpose(x, out, [dim % x.dim() for dim in dims])


@aten("transpose.int")
def transpose(r: Recorder, out: Tensor, x: Tensor, dim0: int, dim1: int) -> ir.Value:
    axes = list(range(x.dim()))
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return r.transpose(x, out, axes)


@aten("t")
def t(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return r.transpose(x, out, list(range(x.dim()))[::-1])


@aten("expand")
def expand(r: Recorder, out: Tensor, x: Tensor, size: Any, implicit: bool = False) -> ir.Value:
    """ONNX's Expand broadcasts both ways: 1 leaves a dimension as it is."""
    shape, given = r.shape(out), r.shape(x)
    given = (*(1,) * (len(shape) - len(given)), *given)
    if shape == r.shape(x):
        return r.value(x)
    sizes = [1 if old == new else new for old, new in zip(given, shape, strict=True)]
    return r.op("Expand", x, r.writer.vector(sizes), shape=shape, dtype=r.dtype(x))


@aten("repeat")
def repeat(r: Recorder, out: Tensor, x: Tensor, repeats: Sequence[Size]) -> ir.Value:
    value = r.value(x)
    if len(repeats) > x.dim():
        value = r.op("Unsqueeze", x, r.writer.vector(list(range(len(repeats) - x.dim()))))
    return r.op("Tile", value, r.writer.vector(r.shape(repeats)))


@aten("cat")
def concatenate(r: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> ir.Value:
    """torch skips tensors of shape [0], whatever the others' rank."""
    parts = [r.cast(part, out.dtype) for part in tensors if tuple(r.shape(part)) != (0,) or out.dim() == 1]
    return parts[0] if len(parts) == 1 else r.op("Concat", *parts, axis=dim % out.dim())


@aten("stack")
def stack(r: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> ir.Value:
    axes = r.writer.vector([dim % out.dim()])
    return r.op("Concat", *(r.op("Unsqueeze", r.cast(part, out.dtype), axes) for part in tensors), axis=dim % out.dim())


@aten("slice.Tensor")
def slice_(
    r: Recorder, out: Tensor, x: Tensor, dim: int = 0, start: Size | None = None, end: Size | None = None, step: int = 1
) -> ir.Value:
    if r.shape(out) == r.shape(x) and step == 1:
        return r.value(x)
    bounds = [0 if start is None else start, LAST if end is None else end]
    begins, ends = (r.writer.vector(r.shape([bound])) for bound in bounds)
    return r.op("Slice", x, begins, ends, r.writer.vector([dim % x.dim()]), r.writer.vector([step]))


@aten("narrow")
def narrow(r: Recorder, out: Tensor, x: Tensor, dim: int, start: Size, length: Size) -> ir.Value:
    return slice_(r, out, x, dim, start, start + length)


@aten("select.int")
def select(r: Recorder, out: Tensor, x: Tensor, dim: int, index: Size) -> ir.Value:
    return r.op("Gather", x, r.scalar(index, torch.int64), axis=dim % x.dim())


@aten("split.Tensor", "split_with_sizes")
def split(r: Recorder, out: list[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> Sequence[ir.Value]:
    if len(out) == 1:
        return [r.value(x)]
    lengths = [r.shape(part)[dim] for part in out]
    return r.writer.ops("Split", r.value(x), r.writer.vector(lengths), outputs=len(out), axis=dim % x.dim())


@aten("unbind.int")
def unbind(r: Recorder, out: list[Tensor], x: Tensor, dim: int = 0) -> list[ir.Value]:
    return [select(r, part, x, dim, index) for index, part in enumerate(out)]


@aten("flip")
def flip(r: Recorder, out: Tensor, x: Tensor, dims: Sequence[int]) -> ir.Value:
    value = r.value(x)
    for dim in dims:
        ends = r.writer.vector([-LAST])
        value = r.op(
            "Slice", value, r.writer.vector([-1]), ends, r.writer.vector([dim % x.dim()]), r.writer.vector([-1])
        )
    return value


@aten("constant_pad_nd")
def pad(r: Recorder, out: Tensor, x: Tensor, pad: Sequence[Size], value: Any = 0) -> ir.Value:
    """torch lists (before, after) from the last axis on."""
    axes = [x.dim() - 1 - number for number in range(len(pad) // 2)]
    amounts = r.writer.vector(r.shape([*pad[0::2], *pad[1::2]]))
    return r.op("Pad", x, amounts, r.scalar(value, x.dtype), r.writer.vector(axes), mode="constant")


@aten("tril")
def lower_triangle(r: Recorder, out: Tensor, x: Tensor, diagonal: Size = 0) -> ir.Value:
    return r.op("Trilu", x, r.scalar(diagonal, torch.int64), upper=0)


@aten("triu")
def upper_triangle(r: Recorder, out: Tensor, x: Tensor, diagonal: Size = 0) -> ir.Value:
    return r.op("Trilu", x, r.scalar(diagonal, torch.int64), upper=1)


@aten("embedding")
def embedding(r: Recorder, out: Tensor, weight: Tensor, indices: Tensor, *options: Any) -> ir.Value:
    return r.op("Gather", weight, indices, axis=0)


@aten("index_select")
def index_select(r: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor) -> ir.Value:
    return r.op("Gather", x, index, axis=dim % x.dim())


@aten("gather")
def gather(r: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> ir.Value:
    return r.op("GatherElements", x, index, axis=dim % x.dim())


@aten("scatter.src", "scatter.value")
def scatter(r: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Any) -> ir.Value:
    if not isinstance(source, Tensor):
        number = r.scalar(source, x.dtype)
        updates = r.op("Expand", number, r.writer.vector(r.shape(index)))
    elif r.shape(source) == r.shape(index):
        updates = r.cast(source, x.dtype)
    else:
        raise CannotRecord("scatter from a part of its source")
    return r.op("ScatterElements", x, index, updates, axis=dim % x.dim())


@aten("index.Tensor")
def index(r: Recorder, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> ir.Value:
    """One index is a Gather. Several are broadcast and read by GatherND, which wants the axes that they index first;
    what they pick takes the place of those axes if they are neighbours, and otherwise comes first."""
    axes = [axis for axis, tensor in enumerate(indices) if tensor is not None]
    picked = [tensor for tensor in indices if tensor is not None]
    if any(tensor.dtype == torch.bool for tensor in picked):
        raise CannotRecord("an index of bools: how much it picks depends on values")
    if len(picked) == 1:
        return r.op("Gather", x, r.cast(picked[0], torch.int64), axis=axes[0])
    with r.paused():
        common = torch.broadcast_shapes(*(tensor.shape for tensor in picked))
    shape = r.shape(common)
    columns = []
    for tensor in picked:
        value = r.broadcast(r.cast(tensor, torch.int64), shape)
        columns.append(r.op("Unsqueeze", value, r.writer.vector([len(shape)])))
    others = [axis for axis in range(x.dim()) if axis not in axes]
    table = r.value(x)
    if axes + others != list(range(x.dim())):
        table = r.op("Transpose", x, perm=axes + others)
    value = r.op("GatherND", table, r.op("Concat", *columns, axis=-1))
    if axes[-1] - axes[0] + 1 != len(axes) or axes[0] == 0:
        return value
    before = [len(shape) + place for place in range(axes[0])]
    after = range(len(shape) + axes[0], len(shape) + len(others))
    return r.op("Transpose", value, perm=[*before, *range(len(shape)), *after])


@aten("topk")
def top_k(
    r: Recorder, out: Any, x: Tensor, k: Size, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[ir.Value, ...]:
    attributes = {"axis": dim % max(x.dim(), 1), "largest": int(largest), "sorted": int(sorted)}
    return r.writer.ops("TopK", r.value(x), r.writer.vector(r.shape([k])), outputs=2, **attributes)


@aten("arange")
def count(r: Recorder, out: Tensor, end: Any, **options: Any) -> ir.Value:
    return count_from(r, out, 0, end)


@aten("arange.start", "arange.start_step")
def count_from(r: Recorder, out: Tensor, start: Any, end: Any, step: Any = 1, **options: Any) -> ir.Value:
    return r.op("Range", *(r.scalar(number, out.dtype) for number in (start, end, step)))


@aten("full", "full_like", "new_full")
def full(r: Recorder, out: Tensor, *arguments: Any, **options: Any) -> ir.Value:
    number = options.get("fill_value", arguments[-1] if arguments else 0)
    return r.broadcast(operand(r, number, out.dtype), r.shape(out))


@aten("zeros", "zeros_like", "new_zeros", "empty.memory_format", "empty_like", "new_empty")
def zeros(r: Recorder, out: Tensor, *arguments: Any, **options: Any) -> ir.Value:
    """Zeros, also where torch leaves memory as it is, so that a graph never depends on it."""
    return r.broadcast(r.scalar(0, out.dtype), r.shape(out))


@aten("ones", "ones_like", "new_ones")
def ones(r: Recorder, out: Tensor, *arguments: Any, **options: Any) -> ir.Value:
    return r.broadcast(r.scalar(1, out.dtype), r.shape(out))


@aten("scalar_tensor")
def scalar_tensor(r: Recorder, out: Tensor, number: Any, **options: Any) -> ir.Value:
    return r.scalar(number, out.dtype)


@aten("fill")
def fill(r: Recorder, out: Tensor, x: Tensor, number: Any) -> ir.Value:
    return r.broadcast(operand(r, number, out.dtype), r.shape(out))


@aten("zero")
def zero(r: Recorder, out: Tensor, x: Tensor) -> ir.Value:
    return zeros(r, out)


def constant_vector(r: Recorder, number: float, length: int) -> ir.Value:
    """A float32 constant [length] of one number."""
    return r.writer.constant(np.full(length, number, dtype=np.float32))


@aten("copy")
def copy(r: Recorder, out: Tensor, x: Tensor, source: Tensor, non_blocking: bool = False) -> ir.Value:
    value = expand(r, out, source, out.shape)
    return r.cast(value, out.dtype)
