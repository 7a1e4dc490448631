"""Values between two segments: in memory up to a limit, in files beyond it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from onnxpress.arrays import Array
from onnxpress.errors import OutputError


class States:
    """One array per value and sample.

    With a folder of its own every array is written there at once, so that a later process finds it; memory is then only
    a cache. Without one, arrays beyond the limit go to a temporary folder.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit, self.keep = limit, folder is not None
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._memory: dict[tuple[str, int], Array] = {}
        self._used = 0
        self._numbers: dict[str, int] = {}
        """A number for the files of each value that is held."""
        self._next = 0

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers that another process needs to find the same values, see `adopt`."""
        return dict(self._numbers)

    def adopt(self, numbers: dict[str, int]) -> None:
        """Go on with files that an earlier process wrote; whatever else lies in the folder is removed."""
        self._numbers, self._next = dict(numbers), max(numbers.values(), default=-1) + 1
        for path in self._path().glob("*.npy"):
            if int(path.stem.split("_")[0]) not in numbers.values():
                path.unlink()

    def put(self, name: str, sample: int, array: Array) -> None:
        """Hold an array. Raises OutputError if the disk is full."""
        if name not in self._numbers:
            self._numbers[name], self._next = self._next, self._next + 1
        fits = self._used + array.nbytes <= self.limit
        if fits:
            self._memory[name, sample] = array
            self._used += array.nbytes
        if self.keep or not fits:
            path = self._file(name, sample)
            try:
                np.save(path, array)
            except OSError as error:
                raise OutputError(
                    f"cannot write {path}: {error.strerror}", hint="free some space, or calibrate with fewer samples"
                ) from error

    def get(self, name: str, sample: int) -> Array:
        found = self._memory.get((name, sample))
        return np.load(self._file(name, sample)) if found is None else found

    def drop(self, name: str) -> None:
        """Forget a value."""
        for key in [key for key in self._memory if key[0] == name]:
            self._used -= self._memory.pop(key).nbytes
        number = self._numbers.pop(name)
        if self._folder is not None:
            for path in self._folder.glob(f"{number}_*.npy"):
                path.unlink()

    def close(self) -> None:
        """Forget everything; files in a folder of its own stay."""
        self._memory.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _file(self, name: str, sample: int) -> Path:
        return self._path() / f"{self._numbers[name]}_{sample}.npy"

    def _path(self) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="onnxpress-states-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder
