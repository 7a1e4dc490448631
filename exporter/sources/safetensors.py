"""The header of a .safetensors file: where each tensor lies, so that it is read only when it is asked for.

The format is https://huggingface.co/docs/safetensors/index#format. Headers are untrusted: every size is checked against
the file before anything is allocated or mapped.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxpress.errors import CorruptFileError, UnsupportedModelError
from onnxpress.graph.tensors import FileTensor

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

SAFETENSORS_DTYPES: Mapping[str, ir.DataType] = {
    "BOOL": ir.DataType.BOOL,
    "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8,
    "U16": ir.DataType.UINT16,
    "I16": ir.DataType.INT16,
    "U32": ir.DataType.UINT32,
    "I32": ir.DataType.INT32,
    "U64": ir.DataType.UINT64,
    "I64": ir.DataType.INT64,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F8_E5M2": ir.DataType.FLOAT8E5M2,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "F32": ir.DataType.FLOAT,
    "F64": ir.DataType.DOUBLE,
}


def read_safetensors(path: Path) -> dict[str, FileTensor]:
    """The tensors of a .safetensors file, by name; reads only its header.

    Raises:
        CorruptFileError: not a safetensors file, truncated, or sizes that contradict each other.
        UnsupportedModelError: an element type that onnxpress does not know.
    """
    header, start, file_size = _read_header(path)
    header.pop("__metadata__", None)
    tensors: dict[str, FileTensor] = {}
    extents: list[tuple[int, int]] = []
    for name, entry in header.items():
        shape, code, begin, end = _parse_entry(path, name, entry)
        dtype = SAFETENSORS_DTYPES.get(code)
        if dtype is None:
            raise UnsupportedModelError(
                f"{path}: tensor {name} has element type {code}, which onnxpress does not read",
                hint=f"it reads {', '.join(SAFETENSORS_DTYPES)}; convert the checkpoint, for example to BF16",
            )
        if not begin <= end <= file_size - start:
            raise CorruptFileError(
                f"{path}: tensor {name} lies at {begin}..{end}, but the file holds {file_size - start} bytes of data",
                hint="the file is truncated or damaged; fetch it again",
            )
        tensor = FileTensor(path, start + begin, dtype, shape, name=name)
        if end - begin != tensor.nbytes:
            raise CorruptFileError(
                f"{path}: tensor {name} of shape {list(shape)} and type {code} needs {tensor.nbytes} bytes, "
                f"its offsets give {end - begin}",
                hint="the header is damaged; fetch the file again",
            )
        tensors[name] = tensor
        extents.append((begin, end))
    position = 0
    for begin, end in sorted(extents):
        if begin != position:
            raise CorruptFileError(f"{path}: tensors overlap or leave a hole at byte {start + min(begin, position)}")
        position = end
    if position != file_size - start:
        raise CorruptFileError(f"{path}: {file_size - start - position} bytes belong to no tensor")
    return tensors


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and the size of the file."""
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_size <= min(MAX_HEADER_BYTES, file_size - 8):
                raise CorruptFileError(
                    f"{path}: not a safetensors file, or truncated (header of {header_size} bytes in {file_size})",
                    hint="fetch the file again; a Git LFS pointer is a text file of about 130 bytes",
                )
            header = json.loads(file.read(header_size), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise CorruptFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: damaged safetensors header: {error}", hint="fetch the file again") from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"{path}: damaged safetensors header: not an object", hint="fetch the file again")
    return header, 8 + header_size, file_size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], str, int, int]:
    """Shape, element type, begin and end of one header entry, all checked to be what they should be."""
    try:
        shape, code, (begin, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
        sizes_are_sane = all(type(size) is int and 0 <= size < 2**63 for size in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sizes_are_sane, code = False, None
    if not sizes_are_sane or not isinstance(code, str):
        raise CorruptFileError(f"{path}: damaged header entry for tensor {name}", hint="fetch the file again")
    return tuple(shape), code, begin, end
