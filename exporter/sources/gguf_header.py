"""The header of a .gguf file: metadata and where each tensor lies.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is untrusted: every count and size is checked
against the file before anything is allocated, so that a few hostile bytes cannot ask for gigabytes. Only versions 2
and 3, little-endian, are read, as other tools do.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from onnxpress.errors import CorruptFileError, UnsupportedModelError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""struct formats by the type number of a metadata value."""
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and how its elements are stored."""

    name: str
    shape: tuple[int, ...]
    """Row-major, as numpy says it: [rows, …, elements per row]."""
    type: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The description of itself that a .gguf begins with."""

    path: Path
    metadata: Mapping[str, Any]
    """Scalars and strings; of arrays only the length, as an ArrayLength."""
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


@dataclass(frozen=True)
class ArrayLength:
    """Stands for an array in the metadata, which is not kept."""

    length: int


def read_header(path: Path) -> Header:
    """Parse and check the header.

    Raises:
        CorruptFileError: not a .gguf, truncated, or sizes that the file cannot hold.
        UnsupportedModelError: another version or byte order, or an unknown element type.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CorruptFileError(f"{path}: not a GGUF file ({size} bytes)", hint="fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Reader(path, mapped).read()
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error.strerror or error}") from error


@dataclass
class _Reader:
    path: Path
    data: mmap.mmap
    position: int = field(default=0)

    def read(self) -> Header:
        if self._take(4) != b"GGUF":
            raise CorruptFileError(f"{self.path}: not a GGUF file", hint="check the path; fetch the file again")
        version = self._scalar("<I")
        if version not in (2, 3):
            big_endian = version & 0xFFFF == 0
            raise UnsupportedModelError(
                f"{self.path}: GGUF version {version} is not read" + (" (big-endian?)" if big_endian else ""),
                hint="convert the model with a current llama.cpp, for a little-endian machine",
            )
        tensor_count, value_count = self._scalar("<Q"), self._scalar("<Q")
        self._need(tensor_count, 24, "tensors")
        self._need(value_count, 13, "metadata values")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"metadata key {key!r} occurs twice")
            metadata[key] = self._value(self._scalar("<I"))
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        start = self._data_start(metadata.get("general.alignment", 32))
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._damaged(f"tensor {name!r} occurs twice")
            tensors[name] = self._locate(name, shape, kind, start + offset)
        return Header(self.path, metadata, tensors)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"metadata of unknown type {kind}")
        element, length = self._scalar("<I"), self._scalar("<Q")
        if element in _SCALARS:
            width = struct.calcsize(_SCALARS[element])
            self._need(length, width, "array elements")
            self.position += length * width
        elif element == _STRING:
            self._need(length, 8, "strings")
            for _ in range(length):
                self._take(self._scalar("<Q"))
        else:  # arrays of arrays: allowed by the format, used by nobody
            raise self._damaged(f"an array of elements of type {element}")
        return ArrayLength(length)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))
        return name, tuple(reversed(shape)), self._scalar("<I"), self._scalar("<Q")

    def _data_start(self, alignment: Any) -> int:
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._damaged(f"alignment {alignment!r} is not a power of two")
        return -(-self.position // alignment) * alignment

    def _locate(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            quantization = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantization]
        except (ValueError, KeyError) as error:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has the unknown element type {kind}",
                hint="a newer gguf package may know it; or take a file in Q8_0, Q4_K_M or F16",
            ) from error
        if shape[-1] % block:
            raise self._damaged(f"tensor {name} has rows of {shape[-1]} elements, which {block} does not divide")
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > len(self.data):
            raise CorruptFileError(
                f"{self.path}: tensor {name} ends at byte {offset + nbytes}, the file at {len(self.data)}",
                hint="the file is truncated; fetch it again",
            )
        return TensorInfo(name, shape, quantization, offset, nbytes)

    def _need(self, count: int, width: int, what: str) -> None:
        """Refuse a count of things of at least `width` bytes each that the rest of the file cannot hold."""
        if count * width > len(self.data) - self.position:
            raise self._damaged(f"it claims {count} {what}, more than the file can hold")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a name is not UTF-8") from error

    def _take(self, count: int) -> bytes:
        self._need(count, 1, "bytes")
        self.position += count
        return self.data[self.position - count : self.position]

    def _damaged(self, why: str) -> CorruptFileError:
        return CorruptFileError(f"{self.path}: damaged GGUF header: {why}", hint="fetch the file again")
