"""Load an ONNX file from anywhere: what it says about its weights is checked before any of them is used."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxpress.errors import CorruptFileError, SourceNotFoundError, UnsafeInputError, UnsupportedModelError
from onnxpress.graph import storage
from onnxpress.graph.tensors import FileTensor, concrete_shape


def load_graph(path: Path | str) -> ir.Model:
    """Read an ONNX file; its external weights stay on disk as FileTensors until they are used.

    Weights that the graph only casts to float32 are float32 in the result (see `onnxpress.graph.storage`).

    Raises:
        SourceNotFoundError: there is no such file.
        CorruptFileError: truncated, not ONNX, external data missing or too short, sizes that contradict shapes, or
            nodes that read values which nothing defines.
        UnsafeInputError: external data outside the folder of the model, by path or by symbolic link.
        UnsupportedModelError: a weight of a type that onnx_ir does not know.
    """
    path = Path(path)
    proto = _read_proto(path)
    for tensor in _tensors(proto.graph):
        dtype = _data_type(tensor, path)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, dtype, path)
        elif dtype == ir.DataType.STRING:
            raise CorruptFileError(f"{path}: {tensor.name!r} has strings as external data.")
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir promises no exception type for malformed protos
        raise CorruptFileError(f"{path} is not a valid ONNX graph: {_root_cause(error)}") from error
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _locate(value.const_value, path)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, _locate(attribute.value, path))
    _check_inputs(model, path)
    storage.decode_weights(model)
    return model


def _read_proto(path: Path) -> onnx.ModelProto:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"There is no file {path}.") from error
    except OSError as error:
        raise SourceNotFoundError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise CorruptFileError(
            f"{path} is not an ONNX file, or it is truncated.", hint="Fetch or export the file again."
        ) from error
    # A file cut between two fields still parses; a model without nodes or operator versions is of no use anyhow.
    if not proto.graph.node or not proto.opset_import:
        raise CorruptFileError(f"{path} holds no graph; it is not an ONNX model, or it is truncated.")
    return proto


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for subgraph in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from _tensors(subgraph)


def _data_type(tensor: onnx.TensorProto, path: Path) -> ir.DataType:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError as error:
        raise UnsupportedModelError(f"{path}: {tensor.name!r} has the unknown data type {tensor.data_type}.") from error
    if dtype == ir.DataType.UNDEFINED:
        raise CorruptFileError(f"{path}: {tensor.name!r} has no data type.")
    return dtype


_TYPED_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.COMPLEX128: "double_data",
}


def _check_inline(tensor: onnx.TensorProto, dtype: ir.DataType, path: Path) -> None:
    """The number of bytes or elements in the tensor must be what its shape announces."""
    if any(dimension < 0 for dimension in tensor.dims):
        raise CorruptFileError(f"{path}: {tensor.name!r} has the shape {list(tensor.dims)}.")
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        found, expected, unit = len(tensor.raw_data), math.ceil(count * dtype.bitwidth / 8), "bytes"
    else:
        found = len(getattr(tensor, _TYPED_FIELDS.get(dtype, "int32_data")))
        complex_parts = 2 if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
        packed = 8 // dtype.bitwidth if dtype != ir.DataType.STRING and dtype.bitwidth < 8 else 1
        expected, unit = math.ceil(count * complex_parts / packed), "values"
    if found != expected:
        raise CorruptFileError(
            f"{path}: {tensor.name!r} holds {found} {unit}; its shape {list(tensor.dims)} needs {expected}."
        )


def _locate(tensor: ir.ExternalTensor, model: Path) -> FileTensor:
    """The tensor as bytes of a file that lies under the model's folder and is long enough."""
    location = os.fsdecode(tensor.location)
    shape = concrete_shape(tensor)
    if any(dimension < 0 for dimension in shape):
        raise CorruptFileError(f"{model}: {tensor.name!r} has the shape {list(shape)}.")
    file = safe_path(location, model)
    offset = tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes:
        raise CorruptFileError(
            f"{model}: {tensor.name!r} claims {length} bytes of external data; its shape {list(shape)} and type "
            f"{tensor.dtype} need {tensor.nbytes}."
        )
    size = file.stat().st_size
    if offset < 0 or offset + length > size:
        raise CorruptFileError(
            f"{file} has {size} bytes; {tensor.name!r} should lie at {offset} to {offset + length}.",
            hint="The file is truncated or belongs to another model: fetch or export it again.",
        )
    return FileTensor(file, offset, tensor.dtype, shape, name=tensor.name)


def safe_path(location: str, model: Path) -> Path:
    """The file that an external data location means.

    It must lie under the folder of the model file. Where the model file is itself a symbolic link, as in the Hugging
    Face cache, the data may be a link as well, into the folder of the file that the model's link leads to.
    """
    hint = "External data must lie in the folder of the model."
    if not location or Path(location).is_absolute() or ".." in Path(location).parts or set("\\\0") & set(location):
        raise UnsafeInputError(f"{model} asks for external data at {location!r}.", hint=hint)
    file = model.parent / location
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise CorruptFileError(
            f"The external data file {file} is missing.", hint="Fetch it beside the model."
        ) from error
    if not any(real.is_relative_to(folder) for folder in (model.parent.resolve(), model.resolve().parent)):
        raise UnsafeInputError(f"{file} is a symbolic link to {real}, outside the folder of the model.", hint=hint)
    if not stat.S_ISREG(real.stat().st_mode):
        raise UnsafeInputError(f"{file} is not a regular file.")
    return real


def _check_inputs(model: ir.Model, path: Path) -> None:
    """Every value that a node reads and every output must be defined somewhere."""
    for graph in model.graphs():
        for output in graph.outputs:
            if output.producer() is None and not output.is_graph_input() and not output.is_initializer():
                raise CorruptFileError(f"{path}: nothing computes the output {output.name!r}.")
        for node in graph:
            for value in node.inputs:
                if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
                    continue
                raise CorruptFileError(f"{path}: node {node.name!r} reads {value.name!r}, which nothing defines.")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
