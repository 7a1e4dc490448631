"""The rows of an activation as they stream by."""

from __future__ import annotations

from collections.abc import Callable

from onnxpress.arrays import Floats


class Each:
    """Hands the rows of an activation on, sample by sample."""

    def __init__(self, take: Callable[[int, Floats], None]) -> None:
        self.take = take

    def update(self, x: Floats, sample: int) -> None:
        self.take(sample, x)
