"""A large file written at many offsets at once, beside its destination, whose place it takes only when it is whole."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from onnxpress.errors import OnnxpressError, OutputError


class FileAside:
    """A file beside its destination, which takes its name on commit and vanishes otherwise."""

    def __init__(self, destination: Path, size: int) -> None:
        self._destination = destination
        self._path = destination.with_name(f".{destination.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        self._size = size
        self._file = -1

    def __enter__(self) -> FileAside:
        with self._errors():
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with self._errors():
                if self._size and hasattr(os, "posix_fallocate"):  # a full disk shows now, not after the computing
                    os.posix_fallocate(self._file, 0, self._size)
        except OnnxpressError:
            self.__exit__()
            raise
        return self

    def write(self, data: memoryview, offset: int) -> None:
        """Write at an offset; safe from several threads."""
        with self._errors():
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written

    def copy_from(self, source: Path, start: int, offset: int, length: int) -> int:
        """Let the kernel copy bytes of a file; returns how many it did, which may be none."""
        done = 0
        with contextlib.suppress(OSError), source.open("rb", buffering=0) as file:  # what is left is read and written
            while hasattr(os, "copy_file_range") and done < length:
                count = os.copy_file_range(file.fileno(), self._file, length - done, start + done, offset + done)
                if count == 0:
                    break
                done += count
        return done

    def commit(self) -> None:
        with self._errors():
            os.close(self._file)
            self._file = -1
            self._path.replace(self._destination)

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            needs = f" ({math.ceil(self._size / 2**20)} MiB needed)" if self._size else ""
            raise OutputError(
                f"Cannot write {self._destination}{needs}: {error.strerror}.",
                hint="Free some space, or write to another folder.",
            ) from error
