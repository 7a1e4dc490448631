"""Results of a method for one block, kept in a file until the graph is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array
from onnxpress.errors import OutputError
from onnxpress.graph.tensors import FileTensor

ALIGNMENT = 64


def write_results(path: Path, arrays: Mapping[str, Array]) -> dict[str, ir.TensorProtocol]:
    """Write arrays to a file, whole or not at all, and return them as tensors in that file.

    Raises OutputError if the disk is full.
    """
    table: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, array in arrays.items():
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        table[name] = {"dtype": ir.DataType.from_numpy(array.dtype).name, "shape": list(array.shape), "offset": offset}
        offset += array.nbytes
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            for name, array in arrays.items():
                file.seek(table[name]["offset"])
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        aside.replace(path)
        # The table is written last: where it is, the arrays are.
        aside.write_text(json.dumps(table), encoding="utf-8")
        aside.replace(_table(path))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="free some space") from error
    return read_results(path)


def read_results(path: Path) -> dict[str, ir.TensorProtocol]:
    """The tensors that `write_results` left in a file; {} if it did not finish."""
    table = _table(path)
    if not table.is_file():
        return {}
    entries = json.loads(table.read_text(encoding="utf-8"))
    return {
        name: FileTensor(path, entry["offset"], ir.DataType[entry["dtype"]], entry["shape"], name=name)
        for name, entry in entries.items()
    }


def _table(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
