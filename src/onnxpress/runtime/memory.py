"""Memory that was freed goes back to the system between the stages of a build."""

from __future__ import annotations

import ctypes
import gc


def trim_memory() -> None:
    """Collect garbage and return freed pages, where the C library can: glibc keeps them otherwise, hundreds of MB
    after a session was closed, and the peak of the next stage comes on top of that."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
