"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def seconds(call: Callable[[], object]) -> float:
    """Run something once; how long it took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ms(times: list[float]) -> float:
    """Median of seconds, in milliseconds."""
    return 1e3 * float(np.median(times))
