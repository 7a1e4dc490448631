"""Where fetched and converted files are kept: $ONNXPRESS_CACHE, $XDG_CACHE_HOME/onnxpress or ~/.cache/onnxpress.

(The hub keeps its own cache, as other tools of its user expect: see HF_HOME.)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxpress.errors import OutputError


def cache_folder() -> Path:
    """The cache of this user; it need not exist yet."""
    if override := os.environ.get("ONNXPRESS_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "onnxpress"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes `target` only if the block succeeds.

    So a folder in the cache is always complete. If another process was faster, its folder stays.

    Raises:
        OutputError: the cache cannot be written (full disk, no permission).
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise _cannot_write(target.parent, error) from error
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise _cannot_write(target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"the cache cannot be written: {error.filename or path}: {error.strerror or error}",
        hint="free some space, or set ONNXPRESS_CACHE to a folder that can be written",
    )
