"""Read and write ONNX files without ever holding the weights in memory.

`load_graph` takes nothing for granted: a file may be truncated, and external data may point anywhere. `save_graph`
evaluates lazy weights (see `onnxpress.graph.tensors`) on all cores and writes each at an offset known beforehand, so
that the bytes on disk depend on the graph alone, and memory on the largest few weights alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from onnxpress.arrays import Array
from onnxpress.errors import OnnxpressError, OutputError, UnsupportedModelError, VerificationError
from onnxpress.files.aside import FileAside
from onnxpress.graph import storage
from onnxpress.graph.checks import load_graph
from onnxpress.graph.tensors import FileTensor, GroupTensor, ViewTensor, concrete_shape, reads_rows, rows_of

__all__ = ["Progress", "copy_graph", "load_graph", "save_graph", "save_graphs"]

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total, from any thread but never from two at once."""

INLINE_BYTES = 1024
"""Tensors up to this size stay in the .onnx file, where shape inference sees them."""
PAGE = 4096
PROTOBUF_LIMIT = 2**31 - 1
SLAB_BYTES = 16 * 2**20
IN_FLIGHT_BYTES = 512 * 2**20
"""Weights being computed at one time; a larger one is computed alone."""


def copy_graph(model: ir.Model) -> ir.Model:
    """A copy whose nodes and values can be edited apart from the original; weights are shared and stay lazy."""
    copy = model.clone()
    for graph in copy.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in values:  # the clone shares types, which `value.dtype = ...` edits in place
            if isinstance(value.type, ir.TensorType):
                value.type = ir.TensorType(value.type.dtype)
    return copy


def save_graph(
    model: ir.Model,
    path: Path | str,
    *,
    external_data: str | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    reuse: Path | str | None = None,
) -> None:
    """Write `model` to `path`, its weights to `external_data` beside it, both or neither: see `save_graphs`."""
    save_graphs({Path(path): model}, external_data=external_data, progress=progress, workers=workers, reuse=reuse)


def save_graphs(
    models: Mapping[Path, ir.Model],
    *,
    external_data: str | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
    reuse: Path | str | None = None,
) -> None:
    """Write graphs to files of one folder, their weights to one file `external_data` beside them, all or nothing.

    A weight that is the same tensor in several graphs is written once.

    Args:
        external_data: file name for the weights; None keeps all in one file, up to protobuf's limit of 2 GiB.
        workers: threads that compute and write weights; by default one per core.
        reuse: weights that already lie in a file under this folder are referred to in place, not copied. It must be
            the folder of the graphs or lie in it.

    Raises:
        OutputError: the disk is full, or the folder cannot be written; nothing is left behind.
        UnsupportedModelError: the graph is too large for one file and `external_data` is None.
        VerificationError: a lazy weight turned out to be something other than it announced.
    """
    if external_data is not None and Path(external_data).name != external_data:
        raise OutputError(f"External data goes beside the model: {external_data!r} is not a plain file name.")
    (folder,) = {path.parent for path in models}
    plan = _Plan(folder, external_data, Path(reuse) if reuse is not None else None)
    stored = {path: model.clone() for path, model in models.items()}
    for model in stored.values():
        storage.encode_weights(model)
        for value in _initializers(model):
            value.const_value = plan.place(value)
    with contextlib.ExitStack() as stack:
        files = []
        if external_data is not None and plan.size:
            files.append(stack.enter_context(FileAside(folder / external_data, plan.size)))
            _write_weights(plan, files[0], progress, workers)
        for path, model in stored.items():
            files.append(stack.enter_context(FileAside(path, 0)))
            files[-1].write(memoryview(_serialize(model)), 0)
        for file in files:
            file.commit()


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    """All initializers that have a value, those of subgraphs included, in graph order."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value


@dataclass
class _Plan:
    """Where each weight goes: decided from shapes and dtypes alone, before anything is computed."""

    folder: Path
    external_data: str | None
    reuse: Path | None
    size: int = 0
    writes: list[tuple[int, ir.TensorProtocol]] = field(default_factory=list)
    offsets: dict[object, int] = field(default_factory=dict)

    def place(self, value: ir.Value) -> ir.TensorProtocol:
        """The tensor that the stored graph holds for the weight: the weight itself, or a reference into a file."""
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == ir.DataType.STRING:
            return tensor
        if self.reuse is not None and isinstance(tensor, FileTensor) and tensor.path.is_relative_to(self.reuse):
            location = tensor.path.relative_to(self.folder)
            return _external(str(location), tensor.offset, tensor, value.name)
        if self.external_data is None or tensor.nbytes <= INLINE_BYTES:
            return tensor
        # The same bytes are written once, whichever initializers they stand for.
        source = tensor.source if isinstance(tensor, ViewTensor) else tensor
        same = (source.path, source.offset, source.nbytes) if isinstance(source, FileTensor) else id(source)
        if same not in self.offsets:
            # Whole pages map directly; smaller weights only need the alignment of a cache line.
            alignment = PAGE if tensor.nbytes >= PAGE else 64
            self.offsets[same] = -(-self.size // alignment) * alignment
            self.size = self.offsets[same] + tensor.nbytes
            self.writes.append((self.offsets[same], source))
        return _external(self.external_data, self.offsets[same], tensor, value.name)

    def units(self) -> list[list[tuple[int, ir.TensorProtocol]]]:
        """Writes that belong to one computation, largest first so that no core is left with a long one at the end."""
        units: dict[int, list[tuple[int, ir.TensorProtocol]]] = {}
        for offset, tensor in self.writes:
            computation = tensor.group if isinstance(tensor, GroupTensor) else tensor
            units.setdefault(id(computation), []).append((offset, tensor))
        return sorted(units.values(), key=_unit_bytes, reverse=True)


def _external(location: str, offset: int, tensor: ir.TensorProtocol, name: str | None) -> ir.ExternalTensor:
    shape = ir.Shape(concrete_shape(tensor))
    return ir.ExternalTensor(location, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name or "")


def _unit_bytes(unit: Sequence[tuple[int, ir.TensorProtocol]]) -> int:
    """Memory that computing a unit takes, as far as its tensors tell."""
    first = unit[0][1]
    extra = first.group.working_bytes if isinstance(first, GroupTensor) else 0
    return extra + sum(tensor.nbytes for _, tensor in unit)


def _slab_bytes(tensor: ir.TensorProtocol) -> int:
    """Memory that a streamed tensor takes: a slab, or a row that is larger than one (an expert)."""
    rows = concrete_shape(tensor)[:1] if reads_rows(tensor) and not isinstance(tensor, FileTensor) else ()
    return max([SLAB_BYTES, *(tensor.nbytes // max(1, count) for count in rows)])


def _write_weights(plan: _Plan, file: FileAside, progress: Progress | None, workers: int | None) -> None:
    """Compute and write all units, a bounded number of bytes at a time; the first error ends it."""
    budget, lock, done = _Budget(IN_FLIGHT_BYTES), threading.Lock(), 0

    def write(unit: list[tuple[int, ir.TensorProtocol]]) -> None:
        nonlocal done
        streamed = len(unit) == 1 and reads_rows(unit[0][1])
        with budget.reserve(_slab_bytes(unit[0][1]) if streamed else _unit_bytes(unit)):
            if isinstance(unit[0][1], GroupTensor):
                results = unit[0][1].group.evaluate()
                for offset, tensor in unit:
                    assert isinstance(tensor, GroupTensor)
                    _write_tensor(file, offset, results[tensor.index], tensor.nbytes)
            else:
                for offset, tensor in unit:
                    _write_tensor(file, offset, tensor, tensor.nbytes)
        with lock:
            done += sum(tensor.nbytes for _, tensor in unit)
            if progress is not None:
                progress(done, total)

    total = sum(tensor.nbytes for _, tensor in plan.writes)
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="onnxpress-save")
    try:
        futures = [pool.submit(write, unit) for unit in plan.units()]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_tensor(file: FileAside, offset: int, tensor: ir.TensorProtocol, nbytes: int) -> None:
    """Write one tensor of `nbytes`, a slab at a time where it can be had in slabs."""
    if tensor.dtype.bitwidth < 8:
        _expect(tensor, len(data := tensor.tobytes()), nbytes)
        file.write(memoryview(data), offset)
    elif isinstance(tensor, FileTensor):
        # what has to be checked goes through this process, the rest does not
        copied = 0 if tensor.finite else file.copy_from(tensor.path, tensor.offset, offset, nbytes)
        for start in range(copied, nbytes, SLAB_BYTES):
            file.write(tensor.read(start, min(SLAB_BYTES, nbytes - start)).data, offset + start)
    elif reads_rows(tensor):
        read, count = rows_of(tensor), concrete_shape(tensor)[0]
        step = max(1, SLAB_BYTES * count // max(nbytes, 1))
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = read(start, stop)
            _expect(tensor, rows.nbytes, nbytes // count * (stop - start))
            _write_array(file, offset + nbytes // count * start, rows)
    else:
        array = tensor.numpy()
        _expect(tensor, array.nbytes, nbytes)
        _write_array(file, offset, array)


def _expect(tensor: ir.TensorProtocol, found: int, announced: int) -> None:
    if found != announced:
        raise VerificationError(f"Weight {tensor.name!r} has {found} bytes; its shape and dtype announce {announced}.")


def _write_array(file: FileAside, offset: int, array: Array) -> None:
    """Write an array in C order; a transposed view is made contiguous a slab at a time."""
    if array.dtype.kind == "V":  # numpy copies strided bfloat16 and float8 element by element, integers in blocks
        array = array.view(np.dtype(f"u{array.dtype.itemsize}"))
    if array.flags.c_contiguous:
        file.write(array.reshape(-1).view(np.uint8).data, offset)
        return
    row_bytes = array.nbytes // len(array)
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, len(array), step):
        slab = np.ascontiguousarray(array[start : start + step])
        file.write(slab.reshape(-1).view(np.uint8).data, offset + start * row_bytes)


def _serialize(model: ir.Model) -> bytes:
    too_large = UnsupportedModelError(
        "The graph is larger than 2 GiB, which one ONNX file cannot hold.", hint="Give its weights a file of their own."
    )
    if sum(_inline_bytes(value) for value in _initializers(model)) > PROTOBUF_LIMIT:
        raise too_large
    try:
        proto: onnx.ModelProto = ir.to_proto(model)
    except ir.serde.SerdeError as error:  # a small weight that turned out to be bad when it was computed
        raise next((cause for cause in _causes(error) if isinstance(cause, OnnxpressError)), error) from error
    if proto.ByteSize() > PROTOBUF_LIMIT:
        raise too_large
    return bytes(proto.SerializeToString(deterministic=True))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _inline_bytes(value: ir.Value) -> int:
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or isinstance(tensor, ir.ExternalTensor):
        return 0
    return tensor.nbytes


class _Budget:
    """Bytes that may be in flight; a request larger than all of them waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()
