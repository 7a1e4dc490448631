"""Masks in a file: one bit a weight, by the weight's name, apart from any model.

The layout is that of safetensors, so that other tools open it: the length of the header in 8 bytes, the header in
JSON, then the bits of one mask after the other, each row padded to whole bytes, the first column in the highest bit.
A mask is called as the weight is and has dtype U8 and shape [rows, ⌈columns / 8⌉]; `__metadata__` holds the format's
name and for each mask its number of columns.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.errors import CorruptFileError, OutputError, SourceNotFoundError

FORMAT = "onnxpress-masks-1"
LARGEST_HEADER = 1 << 24
LARGEST_SIDE = 1 << 31


@dataclass(frozen=True)
class PackedMask:
    """A mask [rows, columns] of a weight as it is stored, True where the weight stays."""

    bits: NDArray[np.uint8]
    """[rows, ⌈columns / 8⌉]"""
    columns: int

    @classmethod
    def pack(cls, mask: NDArray[np.bool_]) -> PackedMask:
        return cls(np.packbits(mask, axis=1), mask.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.bits), self.columns

    def rows(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Rows [start, stop) as booleans."""
        return np.unpackbits(self.bits[start:stop], axis=1, count=self.columns).view(np.bool_)


def write_masks(path: Path, masks: Mapping[str, PackedMask]) -> None:
    """Write a file, whole or not at all. OutputError where that is not possible."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT} | {n: str(m.columns) for n, m in masks.items()}}
    offset = 0
    for name, mask in masks.items():
        header[name] = {
            "dtype": "U8",
            "shape": list(mask.bits.shape),
            "data_offsets": [offset, offset + mask.bits.nbytes],
        }
        offset += mask.bits.nbytes
    text = json.dumps(header).encode()
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for mask in masks.values():
                file.write(np.ascontiguousarray(mask.bits).data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="choose another place") from error


def read_masks(path: Path) -> dict[str, PackedMask]:
    """The masks of a file by name.

    Nothing is taken on trust: SourceNotFoundError where there is no file; CorruptFileError for a header that is no
    JSON of this format, sizes that do not fit each other or the file, and bits set in the padding of rows.
    """
    try:
        with path.open("rb") as file:
            content = file.read(8)
            (length,) = struct.unpack("<Q", content) if len(content) == 8 else (0,)
            if not 2 <= length <= min(LARGEST_HEADER, path.stat().st_size - 8):
                raise _corrupt(path, f"a header of {length} bytes")
            header, data = _parse(path, file.read(length)), file.read()
    except OSError as error:
        raise SourceNotFoundError(f"cannot read masks from {path}: {error.strerror}") from error
    columns = header.pop("__metadata__")
    masks, expected = {}, 0
    for name, entry in header.items():
        shape, start, stop = _place(path, name, entry)
        count = columns.get(name, "")
        if not count.isascii() or not count.isdigit() or len(count) > 10 or -(-int(count) // 8) != shape[1]:
            raise _corrupt(path, f"{name} with {count[:20] or 'no'} columns in {shape[1]} bytes a row")
        if start != expected or stop - start != shape[0] * shape[1] or stop > len(data):
            raise _corrupt(path, f"{name} in bytes {start} to {stop} of {len(data)}, {shape} being its shape")
        mask = PackedMask(np.frombuffer(data, np.uint8, stop - start, start).reshape(shape), int(count))
        if mask.columns % 8 and (mask.bits[:, -1] & (0xFF >> mask.columns % 8)).any():
            raise _corrupt(path, f"{name} with bits beyond its {mask.columns} columns")
        masks[name], expected = mask, stop
    if expected != len(data):
        raise _corrupt(path, f"{len(data) - expected} bytes that belong to no mask")
    return masks


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _corrupt(path, "a header that is not JSON") from None
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _corrupt(path, f"a header without the format {FORMAT}")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt(path, "metadata that is not text")
    return dict(header)


def _place(path: Path, name: str, entry: Any) -> tuple[tuple[int, int], int, int]:
    """Shape, first byte and byte after the last."""
    try:
        (rows, width), (start, stop) = entry["shape"], entry["data_offsets"]
        numbers = (rows, width, start, stop)
        whole = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
        fits = whole and entry["dtype"] == "U8" and 0 < rows < LARGEST_SIDE and 0 < width < LARGEST_SIDE
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise _corrupt(path, f"{name} without a sound dtype, shape and place")
    return (rows, width), start, stop


def _corrupt(path: Path, what: str) -> CorruptFileError:
    return CorruptFileError(f"{path} holds {what}", hint="onnxpress masks FOLDER -o FILE writes such files")
