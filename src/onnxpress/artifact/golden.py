"""A self-test inside the artifact: inputs with the outputs that it had where it was built.

golden/golden.json   kind, tolerance, and for token models inputs and expectations as plain numbers, for any platform
golden/golden.npz    inputs and outputs of other graphs

Decoders are compared by the log-probabilities of the most likely words, with the recorded tokens fed back, so that one
flipped choice does not end the comparison. Other CPUs round differently (4-bit kernels on ARM by 1.5%), hence the
tolerances by format.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.arrays import Array
from onnxpress.errors import CorruptFileError, SourceNotFoundError, VerificationError
from onnxpress.evaluation.opening import open_model
from onnxpress.files.json_files import read_optional_json

FOLDER, RECORD, ARRAYS = "golden", "golden.json", "golden.npz"
SCHEMA_VERSION = 1
INPUT, OUTPUT = "input:", "output:"
"""What the names of arrays begin with."""

TOLERANCES = {"float32": 0.02, "float16": 0.1, "quantized": 0.5}
"""Largest difference of a log-probability, by format (see `golden_format`)."""
SMALLEST_COSINES = {"float32": 0.9999, "float16": 0.999, "quantized": 0.98}


def golden_format(graph: str) -> str:
    """The coarse format of a graph, by the suffix of its file name."""
    stem = graph.removesuffix(".onnx")
    if stem.endswith("_fp16"):
        return "float16"
    return "quantized" if stem.endswith(("_quantized", "_int8", "_uint8", "_q4", "_q4f16", "_q8")) else "float32"


def write_golden(
    folder: str | Path, *, precision: str | None = None, threads: int | None = None, seed: int = 0
) -> Path:
    """Run the artifact in `folder` and record what it computes; `precision` is a key of `TOLERANCES`.

    Returns golden/golden.json. A few kilobytes for models of tokens.
    """
    folder = Path(folder)
    opened = open_model(folder, threads=threads)
    if precision is None:
        names = [path.name for path in sorted(folder.glob("onnx/*.onnx")) or sorted(folder.glob("*.onnx"))]
        found = {golden_format(name) for name in names}
        precision = next(name for name in ("quantized", "float16", "float32") if name in found)
    inputs, arrays = opened.recorded_inputs(seed)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": opened.kind,
        "tolerance": TOLERANCES[precision],
        "smallest_cosine": SMALLEST_COSINES[precision],
        "inputs": inputs,
    }
    record["expected"], outputs = opened.recorded_outputs(inputs, arrays)
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    if arrays:
        stored: dict[str, Any] = {INPUT + name: value for name, value in arrays.items()}
        stored |= {OUTPUT + name: value for name, value in outputs.items()}
        np.savez(target / ARRAYS, **stored)
    (target / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return target / RECORD


def replay_golden(folder: str | Path, *, threads: int | None = None) -> dict[str, float]:
    """Run the recorded inputs again; returns `max_difference` (log-probabilities) or `cosine_min`.

    Raises VerificationError with the figure and the tolerance, SourceNotFoundError without golden/golden.json.
    """
    folder = Path(folder)
    record = read_optional_json(folder / FOLDER / RECORD)
    if not record:
        raise SourceNotFoundError(f"{folder} has no {FOLDER}/{RECORD}: nothing to replay")
    try:
        kind, inputs, expected = record["kind"], record["inputs"], record["expected"]
        tolerance, smallest = float(record["tolerance"]), float(record["smallest_cosine"])
        stored = _load(folder / FOLDER / ARRAYS) if (folder / FOLDER / ARRAYS).is_file() else {}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{folder / FOLDER / RECORD} cannot be read: {error!r}") from error
    opened = open_model(folder, threads=threads)
    if opened.kind != kind:
        raise VerificationError(f"{folder} has kind {opened.kind}, its golden outputs are of kind {kind}")
    plain, outputs = opened.recorded_outputs(inputs, _named(stored, INPUT), expected)
    figures = opened.recorded_difference({**expected, **_named(stored, OUTPUT)}, {**plain, **outputs})
    if (difference := figures.get("max_difference", 0.0)) > tolerance:
        raise VerificationError(
            f"log-probabilities differ from the golden ones by {difference:.3g}; the tolerance is {tolerance:g}"
        )
    if (worst := figures.get("cosine_min", 1.0)) < smallest:
        raise VerificationError(f"outputs have cosine {worst:.5f} with the golden ones; the limit is {smallest}")
    return figures


def _named(stored: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """Those of the arrays whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def _load(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error
