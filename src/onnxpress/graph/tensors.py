"""Weights that are read or computed only when they are written: one class for them all, from any source to the file.

WeightTensor    computed whole, each time that it is asked for.
RowTensor       computed a slab of rows at a time: a cast, a transpose, a concatenation. Memory: one slab.
FileTensor      bytes in a file: read with `pread` on each access, so that they never count as resident memory;
                `mapped` and `columns` map them for as long as their result lives.
ArrayTensor     values that are in memory already.
ViewTensor      the bytes of another tensor in another shape: a file holds them once.
LazyGroup       one computation that yields several tensors, such as quantized weights, their scales and zero points.

Others are made of these where they are needed: tensors of a .gguf and of pickles, parameters converted by transformers
(`onnxpress.exporter.sources`), weights that a file holds in half the bytes (`onnxpress.graph.storage`). All are
`onnx_ir.LazyTensor`s, so that any pass can call `numpy()` on them; nothing is cached between two calls.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Array
from onnxpress.errors import CorruptFileError, VerificationError
from onnxpress.graph.floats import require_finite_weight


def concrete_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor as plain integers."""
    return tuple(int(dimension) for dimension in tensor.shape)  # type: ignore[arg-type]


class WeightTensor(ir.LazyTensor):
    """A weight that is read or computed each time that it is asked for."""

    def __init__(
        self, compute: Callable[[], Array], dtype: ir.DataType, shape: Sequence[int], *, name: str | None = None
    ) -> None:
        """`compute()` returns the values, of `dtype` and `shape`; it is called from several threads."""
        super().__init__(self._whole, dtype, ir.Shape(shape), name=name)
        self._compute = compute

    def _whole(self) -> ir.TensorProtocol:
        return ir.Tensor(self._compute(), dtype=self.dtype, shape=ir.Shape(concrete_shape(self)))

    @property
    def reads_rows(self) -> bool:
        """Whether `rows` costs only the rows asked for."""
        return False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(concrete_shape(self))

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file that it is read from."""
        return self.nbytes

    def rows(self, start: int, stop: int) -> Array:
        """Rows `[start, stop)` of the leading axis."""
        return np.asarray(self.numpy()[start:stop])

    def mapped(self) -> Array:
        """The values, for whoever copies them at once: possibly a read-only view of a mapped file."""
        return self.numpy()

    def checked(self, name: str) -> WeightTensor:
        """The same weight under another name; reading it raises CorruptFileError where it holds NaN or infinity."""
        return apply_to_rows(self, lambda values: require_finite_weight(values, name), name=name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {self.dtype}{list(concrete_shape(self))})"


class RowTensor(WeightTensor):
    """A weight that can be computed a slab of leading rows at a time."""

    def __init__(
        self,
        rows: Callable[[int, int], Array],
        dtype: ir.DataType,
        shape: Sequence[int],
        *,
        name: str | None = None,
    ) -> None:
        """`rows(start, stop)` returns `[stop - start, *shape[1:]]`; it is called from several threads."""
        super().__init__(lambda: rows(0, shape[0]), dtype, shape, name=name)
        self._rows = rows

    @property
    def reads_rows(self) -> bool:
        return True

    def rows(self, start: int, stop: int) -> Array:
        return self._rows(start, stop)


class FileTensor(WeightTensor):
    """A weight whose little-endian bytes lie in a file."""

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
        super().__init__(self._values, dtype, shape, name=name)
        self.path = path
        self.offset = offset
        self.finite = finite

    @property
    def reads_rows(self) -> bool:  # rows of less than a byte an element need not start on a byte
        return len(self.shape) > 0 and self.dtype.bitwidth >= 8

    def rows(self, start: int, stop: int) -> Array:
        if not self.reads_rows:
            return super().rows(start, stop)
        shape = concrete_shape(self)
        row_bytes = math.prod(shape[1:]) * self.dtype.bitwidth // 8
        raw = self.read(start * row_bytes, (stop - start) * row_bytes)
        return raw.view(self.dtype.numpy()).reshape(stop - start, *shape[1:])

    def columns(self, start: int, stop: int) -> Array:
        """Columns `[start, stop)` of a matrix, as a read-only view of the mapped file."""
        part = self.mapped()[:, start:stop]
        return require_finite_weight(part, self.name) if self.finite else part

    def mapped(self) -> Array:
        raw = map_file(self.path, self.offset, self.nbytes)
        return raw.view(self.dtype.numpy()).reshape(concrete_shape(self))

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
            require_finite_weight(raw.view(self.dtype.numpy()), self.name)
        return raw

    def tobytes(self) -> bytes:
        return self.read(0, self.nbytes).tobytes()

    def checked(self, name: str) -> FileTensor:
        return FileTensor(self.path, self.offset, self.dtype, concrete_shape(self), name=name, finite=True)

    def _values(self) -> Array:
        raw = self.read(0, self.nbytes)
        if self.dtype.bitwidth < 8:
            return np.asarray(ir.PackedTensor(raw, self.dtype, shape=ir.Shape(concrete_shape(self))).numpy())
        return raw.view(self.dtype.numpy()).reshape(concrete_shape(self))


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


class GroupTensor(WeightTensor):
    """One member of a LazyGroup."""

    def __init__(self, group: LazyGroup, index: int, dtype: ir.DataType, shape: Sequence[int]) -> None:
        super().__init__(lambda: group.evaluate()[index].numpy(), dtype, shape)
        self.group = group
        self.index = index


class ArrayTensor(WeightTensor):
    """Values that are in memory already."""

    def __init__(self, name: str, array: Array) -> None:
        super().__init__(lambda: array, ir.DataType.from_numpy(array.dtype), array.shape, name=name)


class ViewTensor(WeightTensor):
    """The bytes of `source`, an initializer of the same graph, in another shape."""

    def __init__(self, source: ir.TensorProtocol, shape: Sequence[int], *, name: str | None = None) -> None:
        super().__init__(lambda: source.numpy().reshape(shape), source.dtype, shape, name=name)
        self.source = source


def reads_rows(tensor: ir.TensorProtocol) -> bool:
    """Whether some rows of a tensor cost less than all of them."""
    return isinstance(tensor, WeightTensor) and tensor.reads_rows


def rows_of(tensor: ir.TensorProtocol) -> Callable[[int, int], Array]:
    """A reader of row slabs `[start, stop)` of any tensor, reading no more than these rows where that is possible."""
    if isinstance(tensor, WeightTensor):
        return tensor.rows
    return lambda start, stop: np.asarray(tensor.numpy()[start:stop])


def slabs_of(tensor: ir.TensorProtocol, nbytes: int) -> Iterator[Array]:
    """The values from the first row to the last, `nbytes` (or one row) at a time, read so where that is possible."""
    if len(tensor.shape) == 0:
        yield tensor.numpy()
        return
    read = rows_of(tensor if reads_rows(tensor) else ir.tensor(tensor.numpy()))
    count = concrete_shape(tensor)[0]
    step = max(1, nbytes * count // max(1, tensor.nbytes))
    for start in range(0, count, step):
        yield read(start, min(count, start + step))


def apply_to_rows(
    tensor: ir.TensorProtocol,
    function: Callable[[Array], Array],
    dtype: ir.DataType | None = None,
    *,
    name: str | None = None,
) -> WeightTensor:
    """`function(tensor)`, a slab of rows at a time where the tensor can be read so.

    function: takes any rows `[n, …]` of the tensor, or the whole of it, to as many of the same shape.
    dtype: of what it returns; by default the tensor's.
    """
    dtype, shape, name = dtype or tensor.dtype, concrete_shape(tensor), name or tensor.name
    if reads_rows(tensor):
        read = rows_of(tensor)
        return RowTensor(lambda start, stop: function(read(start, stop)), dtype, shape, name=name)
    return WeightTensor(lambda: function(tensor.numpy()), dtype, shape, name=name)


def concatenate_tensors(tensors: Sequence[ir.TensorProtocol], axis: int) -> WeightTensor:
    """Weights side by side along `axis` (not the leading one, or vectors), read when they are written.

    They agree in dtype and in all other dimensions. Slab by slab where all of them can be read so.
    """
    shape = list(concrete_shape(tensors[0]))
    shape[axis] = sum(concrete_shape(tensor)[axis] for tensor in tensors)
    dtype = tensors[0].dtype
    if axis != 0 and all(map(reads_rows, tensors)):
        readers = [rows_of(tensor) for tensor in tensors]
        return RowTensor(lambda a, b: np.concatenate([read(a, b) for read in readers], axis), dtype, shape)
    return WeightTensor(lambda: np.concatenate([tensor.numpy() for tensor in tensors], axis), dtype, shape)
