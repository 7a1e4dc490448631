"""The rows of an activation as they stream by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


class Each:
    """Hands the rows of an activation on, sample by sample."""

    def __init__(self, take: Callable[[int, Rows], None]) -> None:
        self.take = take

    def update(self, x: Rows, sample: int) -> None:
        self.take(sample, x)
