"""Targets of regressions: what a product's output should add up to, token by token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.calibration.states import States
from onnxpress.errors import UnsupportedModelError
from onnxpress.optimizers.fitting.moments import StreamLengths
from onnxpress.optimizers.fitting.ridge import Normal
from onnxpress.optimizers.fitting.statistics import ROWS, require_finite_sums

HELD_OUT = 4
"""One part in so many of each sample's tokens, its last ones, is for judging, not for fitting."""


class Target:
    """Rows [tokens, features] of each sample, to which terms are added as they stream by; in files beyond a limit."""

    def __init__(self, memory_bytes: int) -> None:
        self._states = States(memory_bytes)

    def rows(self, sample: int) -> Floats:
        rows: Floats = self._states.get(str(sample), 0)
        return rows

    def add(self, x: Floats, sample: int, sign: int = 1) -> None:
        """Raises UnsupportedModelError where terms differ in shape."""
        if str(sample) in self._states.numbers:
            before = self.rows(sample)
            if before.shape != x.shape:
                raise UnsupportedModelError(
                    f"rows {list(x.shape)} cannot be compared with the reference's {list(before.shape)}"
                )
            x = before + np.float32(sign) * x
            self._states.drop(str(sample))
        self._states.put(str(sample), 0, np.array(x, np.float32))

    def shift(self, bias: NDArray[np.floating]) -> None:
        """Add a bias [features] to all rows."""
        for sample in list(self._states.numbers):
            self.add(np.broadcast_to(np.asarray(bias, np.float32), self.rows(int(sample)).shape), int(sample))

    def lengths(self) -> StreamLengths:
        """The lengths of the rows as they are by now."""
        lengths = StreamLengths()
        for sample in map(int, self._states.numbers):
            lengths.update(self.rows(sample), sample)
        return lengths

    def close(self) -> None:
        self._states.close()


class Plus:
    """Adds what it sees to a target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def update(self, x: Floats, sample: int) -> None:
        self.target.add(x, sample)


class Minus:
    """Takes what it sees away from a target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def update(self, x: Floats, sample: int) -> None:
        self.target.add(x, sample, -1)


class Regression:
    """The normal equations of target ≈ x · W, of the tokens to fit on and, apart, of those to judge by."""

    def __init__(
        self, target: Target, lengths: StreamLengths, features: tuple[int, int], tensor: str, *, intercept: bool
    ) -> None:
        """
        Args:
            lengths: of the stream that the output joins; tokens are weighted by them.
            features: of the product, (in, out).
            tensor: the name of x.
            intercept: whether to fit a bias, as the weight of a last input that is always 1.
        """
        self.target, self.lengths, self.tensor, self.intercept = target, lengths, tensor, intercept
        self.fit, self.held_out = (Normal.empty(features[0] + intercept, features[1]) for _ in range(2))

    def update(self, x: Floats, sample: int) -> None:
        wanted, weights = self.target.rows(sample), self.lengths.weights(sample, len(x))
        border = len(x) - len(x) // HELD_OUT
        for part, begin, end in ((self.fit, 0, border), (self.held_out, border, len(x))):
            for start in range(begin, end, ROWS):
                here = slice(start, min(start + ROWS, end))
                root = np.sqrt(weights[here])[:, None]
                rows = x[here] * root
                if self.intercept:
                    rows = np.concatenate([rows, root], axis=1)
                require_finite_sums(np.einsum("ij,ij->j", rows, rows), self.tensor, sample)
                part.add(rows, wanted[here] * root)
