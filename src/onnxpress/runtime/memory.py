"""Memory: how much a process took and the system has left, and giving back what was freed."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path


def trim_memory() -> None:
    """Collect garbage and return freed pages, where the C library can: glibc keeps them otherwise, hundreds of MB
    after a session was closed, and the peak of the next stage comes on top of that."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_rss_bytes() -> int:
    """Return the high-water mark of this process's resident memory, from /proc, or getrusage where there is none."""
    found = _proc_bytes("/proc/self/status", "VmHWM")
    if found is not None:
        return found
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory() -> int:
    """Return the bytes that the system can hand out without swapping, as Linux says; elsewhere the physical memory."""
    found = _proc_bytes("/proc/meminfo", "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found


def _proc_bytes(path: str, key: str) -> int | None:
    """Read a line like `MemAvailable: 1234 kB` of a file in /proc; None where there is none."""
    try:
        for line in Path(path).read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
