"""Records to calibrate with, whatever they are kept in: texts, pairs of texts, recordings, or inputs as they are.

.jsonl             a text, a pair or inputs a line: {"text": …}, {"first": …, "second": …}, {"input_ids": […], …}
.csv .tsv .tab     a text or a pair a row; numbers, such as scores, are left out
.npz               arrays by the names of the graph's inputs, samples along the first axis
folder             of .wav files
NAME[:SPLIT]       a data set, where the package `datasets` is installed and has it or may fetch it
anything else      one text
"""

from __future__ import annotations

import csv
import json
import wave
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.errors import BadInputError, CorruptFileError, SourceNotFoundError
from onnxpress.evaluation.texts import read_text

TEXT_FIELDS = ("text", "content", "sentence", "prompt", "document")
PAIR_FIELDS = (
    ("first", "second"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("anchor", "positive"),
    ("source", "target"),
    ("question", "answer"),
)


@dataclass(frozen=True)
class Texts:
    """One text, or two that belong together: similar sentences, a sentence and its translation."""

    first: str
    second: str | None = None


@dataclass(frozen=True)
class Recording:
    """Mono samples in -1 … 1."""

    samples: NDArray[np.float32]
    rate: int
    name: str


Inputs = Mapping[str, NDArray[Any]]
"""Inputs of a graph for one sample, without a batch axis."""
CalibrationRecord = Texts | Recording | Inputs


def read_records(source: str) -> Iterator[CalibrationRecord]:
    """The records of a file, folder or data set, one by one.

    Raises SourceNotFoundError, CorruptFileError or BadInputError, naming the file and the line.
    """
    path = Path(source)
    if path.is_dir():
        yield from _recordings(path)
    elif path.is_file():
        reader = {".jsonl": _json_lines, ".csv": _rows, ".tsv": _rows, ".tab": _rows, ".npz": _arrays}
        yield from reader.get(path.suffix.lower(), _whole)(path)
    elif path.suffix or source.startswith((".", "/", "~")):
        raise SourceNotFoundError(f"no such file or folder: {source}")
    else:
        yield from _dataset(source)


def _whole(path: Path) -> Iterator[CalibrationRecord]:
    if path.suffix.lower() == ".wav":
        yield read_wav(path)
    else:
        yield Texts(read_text(path))


def _json_lines(path: Path) -> Iterator[CalibrationRecord]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            hint = "a .jsonl file has an object a line"
            raise CorruptFileError(f"{path}, line {number}: not JSON: {error}", hint=hint) from error
        yield _record(entry, f"{path}, line {number}")


def _record(entry: Any, where: str) -> CalibrationRecord:
    """A text, a pair or inputs from an object."""
    if isinstance(entry, str):
        return Texts(entry)
    if isinstance(entry, Mapping):
        for first, second in PAIR_FIELDS:
            if isinstance(entry.get(first), str) and isinstance(entry.get(second), str):
                return Texts(entry[first], entry[second])
        for name in TEXT_FIELDS:
            if isinstance(entry.get(name), str):
                return Texts(entry[name])
        arrays = {str(name): value for name, value in entry.items() if isinstance(value, list | int | float)}
        if arrays and len(arrays) == len(entry):
            try:
                return {name: np.array(value) for name, value in arrays.items()}
            except ValueError as error:
                raise BadInputError(f"{where}: rows of different lengths: {error}") from error
    raise BadInputError(f"{where}: neither a text nor inputs", hint=f"an object with one of {', '.join(TEXT_FIELDS)}")


def _rows(path: Path) -> Iterator[CalibrationRecord]:
    text = read_text(path)
    delimiter = "," if path.suffix.lower() == ".csv" and "\t" not in text.split("\n", 1)[0] else "\t"
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), start=1):
        texts = [cell for cell in row if cell.strip() and not _is_number(cell)]
        header = number == 1 and all(" " not in cell.strip() for cell in row)
        if texts and not header:
            yield Texts(texts[0], texts[1] if len(texts) > 1 else None)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _arrays(path: Path) -> Iterator[CalibrationRecord]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        hint = "numpy.savez writes such a file, with an array for each input"
        raise CorruptFileError(f"cannot read {path}: {error}", hint=hint) from error
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not counts or len(set(counts.values())) > 1 or not next(iter(counts.values())):
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "nothing"
        raise BadInputError(f"{path} holds {found}", hint="arrays with one row a sample, as many in each")
    for row in range(next(iter(counts.values()))):
        yield {name: array[row] for name, array in arrays.items()}


def _recordings(folder: Path) -> Iterator[CalibrationRecord]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav")
    if not paths:
        raise BadInputError(f"{folder} has no .wav files", hint="give a folder of recordings, or a file")
    for path in paths:
        yield read_wav(path)


def read_wav(path: Path) -> Recording:
    """PCM of 8, 16, 24 or 32 bits; channels are averaged. Raises CorruptFileError or BadInputError."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    except (wave.Error, EOFError, OSError) as error:
        raise CorruptFileError(f"cannot read {path}: {error}", hint="recordings are .wav files of PCM") from error
    raw = raw[: len(raw) // (width * channels) * (width * channels)]
    if not len(raw):
        raise BadInputError(f"{path} is empty")
    if width == 1:  # unsigned, unlike all others
        values = raw.astype(np.float32) - 128
    elif width == 3:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        values = (wide.reshape(-1).view("<i4") >> 8).astype(np.float32)
    else:
        values = raw.view(f"<i{width}").astype(np.float32)
    mono = values.reshape(-1, channels).mean(axis=1) / np.float32(1 << (8 * width - 1))
    return Recording(mono.astype(np.float32), rate, path.name)


def _dataset(name: str) -> Iterator[CalibrationRecord]:
    try:
        import datasets
    except ImportError as error:
        raise SourceNotFoundError(
            f"there is no file {name}, and data sets need a package that is not installed",
            hint="pip install datasets, or give a file",
        ) from error
    path, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(path, split=split or "train", streaming=True)
        for number, row in enumerate(rows):
            yield _record({key: value for key, value in row.items() if isinstance(value, str)}, f"{name}, row {number}")
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceNotFoundError(f"cannot read the data set {name}: {first}", hint="is there a network?") from error
