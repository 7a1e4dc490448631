"""Folders, and files, that appear whole or not at all.

`replacing(target)` hands out a temporary folder beside the target and swaps it in when the block ends well. Whatever
happens to the process, the target is at any moment the old folder, the new one, or absent if there was none. Each
temporary folder is held by a lock that the kernel drops with the process: the next run removes the unlocked ones that
killed processes left. Two builds to one target each have their own; the last to end wins.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from onnxpress.errors import OutputError, UsageError
from onnxpress.files.layout import is_artifact

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True)
class Staging:
    """`result` becomes the target; `work` is for intermediate files and goes away."""

    result: Path
    work: Path


def check_target(target: Path, option: str = "--output") -> None:
    """Raise UsageError unless `target` is free, an empty folder, or an artifact that may be replaced.

    option: of the command line, that chose the folder.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} exists and is not a folder", hint=f"choose another folder with {option}")
    if target.is_dir() and any(target.iterdir()) and not is_artifact(target):
        raise UsageError(
            f"{target} exists and is not an onnxpress artifact: it would be overwritten",
            hint=f"choose another folder with {option}",
        )


@contextmanager
def replacing(target: Path, option: str = "--output") -> Iterator[Staging]:
    """Yield a Staging whose `result` replaces `target` if the block ends without an exception.

    Raises UsageError if `target` holds something else than an artifact, OutputError if it cannot be written (full disk,
    quota, permissions; also where the block itself hits these).
    """
    target = target.resolve()
    check_target(target, option)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder, lock = _locked_folder(target)
    except OSError as error:
        raise as_output_error(error, target) from error
    try:
        staging = Staging(folder / "result", folder / "work")
        staging.result.mkdir()
        staging.work.mkdir()
        yield staging
        _sync(staging.result)
        check_target(target, option)  # it may have changed meanwhile
        _swap_in(staging.result, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise as_output_error(error, target) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a path that becomes the file `target` if the block ends without an exception. Raises OutputError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        try:
            yield Path(name)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise as_output_error(error, target) from error


def as_output_error(error: OSError, target: Path) -> OutputError:
    hint = {
        errno.ENOSPC: "free some space, or choose another disk with --output",
        errno.EDQUOT: "your quota is used up: choose another disk with --output",
        errno.EFBIG: "the file would exceed a size limit of this shell (ulimit -f) or file system",
    }.get(error.errno or 0, "choose another folder with --output")
    return OutputError(f"cannot write {target}: {error.strerror or error}", hint=hint)


def _prefix(target: Path) -> str:
    return f".{target.name}.building-"


def _locked_folder(target: Path) -> tuple[Path, int]:
    """A fresh folder beside `target` and the descriptor whose lock says that its owner lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        # Another run may take it for a leftover before it is locked: then it is gone, and the next one is tried.
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if folder.exists():
                    folder.chmod(0o755)  # mkdtemp's 0o700 is for secrets
                    return folder, lock
            except OSError:
                pass
            os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed runs left beside `target`: the folders that no living process has locked."""
    for folder in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _swap_in(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`, whose old content ends up where `new` was."""
    while True:
        try:
            new.rename(target)  # replaces an empty folder, too
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _exchange(new, target):
            return
        # No atomic exchange here: the old artifact is out of the way for a moment.
        old = new.with_name("old")
        with suppress(FileNotFoundError):
            target.rename(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically (Linux's renameat2); False where kernel, file system or platform cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _sync(folder: Path) -> None:
    """Flush files to the disk before the rename: after a power cut, no renamed folder of empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
