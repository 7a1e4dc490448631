"""Weights that are computed or read only when they are written.

FileTensor   bytes in a file: read with `pread` on each access, so that they never count as resident memory; `columns`
             maps them for as long as its result lives.
RowTensor    computed a slab of rows at a time: a cast, a transpose, a concatenation. Memory: one slab.
LazyGroup    one computation that yields several tensors, such as quantized weights, their scales and zero points.
ViewTensor   the bytes of another tensor in another shape: a file holds them once.

All are `onnx_ir.LazyTensor`s, so that any pass can call `numpy()` on them; nothing is cached between two calls.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Array
from onnxpress.errors import CorruptFileError, VerificationError
from onnxpress.graph.floats import require_finite


def concrete_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor as plain integers."""
    return tuple(int(dimension) for dimension in tensor.shape)  # type: ignore[arg-type]


class RowTensor(ir.LazyTensor):
    """A tensor that can be computed a slab of leading rows at a time."""

    def __init__(
        self,
        rows: Callable[[int, int], Array],
        dtype: ir.DataType,
        shape: Sequence[int],
        *,
        name: str | None = None,
    ) -> None:
        """`rows(start, stop)` returns `[stop - start, *shape[1:]]`; it is called from several threads."""
        self._rows = rows
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)

    def rows(self, start: int, stop: int) -> Array:
        return self._rows(start, stop)

    def _whole(self) -> ir.TensorProtocol:
        shape = concrete_shape(self)
        return ir.Tensor(self._rows(0, shape[0]), dtype=self.dtype, shape=ir.Shape(shape))


def rows_of(tensor: ir.TensorProtocol) -> Callable[[int, int], Array]:
    """A reader of row slabs `[start, stop)` of any tensor, reading no more than these rows where that is possible."""
    if isinstance(tensor, (RowTensor, FileTensor)):
        return tensor.rows
    return lambda start, stop: np.asarray(tensor.numpy()[start:stop])


class FileTensor(ir.LazyTensor):
    """A tensor whose little-endian bytes lie in a file."""

    def __init__(
        self,
        path: Path,
        offset: int,
        dtype: ir.DataType,
        shape: Sequence[int],
        *,
        name: str | None = None,
        finite: bool = False,
    ) -> None:
        """`finite`: whatever is read is checked, and CorruptFileError raised for NaN and infinity."""
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self.path = path
        self.offset = offset
        self.finite = finite

    def rows(self, start: int, stop: int) -> Array:
        """Rows `[start, stop)` of the leading axis."""
        shape = concrete_shape(self)
        if self.dtype.bitwidth < 8:  # rows need not start on a byte
            return np.asarray(self.numpy()[start:stop])
        row_bytes = math.prod(shape[1:]) * self.dtype.bitwidth // 8
        raw = self.read(start * row_bytes, (stop - start) * row_bytes)
        return raw.view(self.dtype.numpy()).reshape(stop - start, *shape[1:])

    def columns(self, start: int, stop: int) -> Array:
        """Columns `[start, stop)` of a matrix, as a read-only view of the mapped file."""
        raw = map_file(self.path, self.offset, self.nbytes)
        part = raw.view(self.dtype.numpy()).reshape(concrete_shape(self))[:, start:stop]
        return require_finite(part, self.name) if self.finite else part

    def read(self, start: int, length: int) -> NDArray[np.uint8]:
        """Bytes `[start, start + length)` of the tensor, both multiples of its elements' size.

        CorruptFileError if the file has become shorter.
        """
        raw = np.empty(length, np.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                done = 0
                while done < length:
                    got = os.preadv(file.fileno(), [raw.data[done:]], self.offset + start + done)
                    if got == 0:
                        raise CorruptFileError(f"{self.path} ends inside tensor {self.name!r}.")
                    done += got
        except OSError as error:
            raise CorruptFileError(f"Cannot read tensor {self.name!r} from {self.path}: {error.strerror}.") from error
        if self.finite:
            require_finite(raw.view(self.dtype.numpy()), self.name)
        return raw

    def tobytes(self) -> bytes:
        return self.read(0, self.nbytes).tobytes()

    def _whole(self) -> ir.TensorProtocol:
        raw, shape = self.read(0, self.nbytes), ir.Shape(concrete_shape(self))
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(raw, self.dtype, shape=shape)
        return ir.Tensor(raw.view(self.dtype.numpy()).reshape(concrete_shape(self)), dtype=self.dtype, shape=shape)


def map_file(path: Path, offset: int, nbytes: int) -> NDArray[np.uint8]:
    """A read-only uint8 view of part of a file.

    Raises:
        CorruptFileError: the file became unreadable or shorter since its header was read.
    """
    if nbytes == 0:
        return np.empty(0, dtype=np.uint8)
    try:
        return np.asarray(np.memmap(path, mode="r", dtype=np.uint8, offset=offset, shape=(nbytes,)))
    except (OSError, ValueError) as error:
        raise CorruptFileError(
            f"{path}: cannot read {nbytes} bytes at {offset}: {error}",
            hint="the file changed or vanished after it was opened; start again",
        ) from error


class LazyGroup:
    """One computation, several tensors: computed once when a graph is saved, and again by each `numpy()`."""

    def __init__(
        self,
        compute: Callable[[], Sequence[Array]],
        specs: Sequence[tuple[ir.DataType, Sequence[int]]],
        *,
        working_bytes: int = 0,
    ) -> None:
        """`compute` returns one array per (dtype, shape) in `specs`; `working_bytes` is what it needs meanwhile."""
        self._compute = compute
        self.working_bytes = working_bytes
        self.tensors = tuple(GroupTensor(self, index, dtype, shape) for index, (dtype, shape) in enumerate(specs))

    def evaluate(self) -> list[ir.Tensor[Any]]:
        """All tensors, computed now. VerificationError if they are not what was announced."""
        arrays = self._compute()
        if len(arrays) != len(self.tensors):
            raise VerificationError(f"A group announced {len(self.tensors)} tensors and computed {len(arrays)}.")
        results = []
        for tensor, array in zip(self.tensors, arrays, strict=True):
            if array.shape != concrete_shape(tensor):
                raise VerificationError(
                    f"{tensor.name}: computed shape {list(array.shape)} instead of {list(concrete_shape(tensor))}."
                )
            results.append(ir.Tensor(array, dtype=tensor.dtype, shape=tensor.shape, name=tensor.name))
        return results


class GroupTensor(ir.LazyTensor):
    """One member of a LazyGroup."""

    def __init__(self, group: LazyGroup, index: int, dtype: ir.DataType, shape: Sequence[int]) -> None:
        super().__init__(lambda: group.evaluate()[index], dtype, ir.Shape(shape))
        self.group = group
        self.index = index


class ViewTensor(ir.LazyTensor):
    """The bytes of `source`, an initializer of the same graph, in another shape."""

    def __init__(self, source: ir.TensorProtocol, shape: Sequence[int], *, name: str | None = None) -> None:
        super().__init__(self._whole, source.dtype, ir.Shape(shape), name=name)
        self.source = source

    def _whole(self) -> ir.TensorProtocol:
        shape = concrete_shape(self)
        return ir.Tensor(self.source.numpy().reshape(shape), dtype=self.dtype, shape=ir.Shape(shape))


def concatenate(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.LazyTensor:
    """Weights side by side along `axis` (not the leading one, or vectors), read when they are written.

    They agree in dtype and in all other dimensions. Slab by slab where all of them can be read so.
    """
    shape = list(concrete_shape(tensors[0]))
    shape[axis] = sum(concrete_shape(tensor)[axis] for tensor in tensors)
    dtype = tensors[0].dtype
    if axis != 0 and all(isinstance(tensor, (RowTensor, FileTensor)) for tensor in tensors):
        readers = [rows_of(tensor) for tensor in tensors]
        return RowTensor(lambda a, b: np.concatenate([read(a, b) for read in readers], axis), dtype, shape)
    return ir.LazyTensor(
        lambda: ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis), dtype=dtype),
        dtype,
        ir.Shape(shape),
    )
