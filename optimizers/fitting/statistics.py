"""Statistics of activations that stream by: moments, ranges, never the samples.

Every accumulator takes `update(x, sample)` with x [tokens, features] float32 and a name for the sample it came from,
and `merge(other)`, so that parts of the data can be seen apart, in any order. Values that are not finite, or whose
squares are not, raise BadInputError with the names of tensor and sample.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Doubles, Floats
from onnxpress.errors import BadInputError

TINY = 1e-30
"""The least that a sum of squares is divided by: a row of zeros loses nothing."""
ROWS = 1024
"""Tokens whose products are summed in float32, at a loss of about 6e-8 · ROWS^½, before they join the float64 sum."""


class Gram:
    """E[x xᵀ] of an activation: what GPTQ, AWQ and ridge regressions need. Memory: features² float64."""

    def __init__(self, features: int, tensor: str) -> None:
        self.tensor = tensor
        self.total: Doubles = np.zeros((features, features))
        self.count = 0

    def update(self, x: Floats, sample: str | int) -> None:
        for start in range(0, len(x), ROWS):
            rows = x[start : start + ROWS]
            with np.errstate(over="ignore", invalid="ignore"):
                product = rows.T @ rows
            require_finite_sums(np.diagonal(product), self.tensor, sample)  # a single NaN of a channel is in its square
            self.total += product
            self.count += len(rows)

    def merge(self, other: Self) -> None:
        self.total += other.total
        self.count += other.count

    def matrix(self) -> Doubles:
        """[features, features]; BadInputError if nothing was seen."""
        require_data(self.count, self.tensor)
        return self.total / self.count


class ChannelStatistics:
    """Range and moments of each channel, [features] each: what smoothing and importance need."""

    def __init__(self, features: int, tensor: str) -> None:
        self.tensor = tensor
        self.low: Floats = np.full(features, np.inf, np.float32)
        self.high: Floats = np.full(features, -np.inf, np.float32)
        self.magnitude: Doubles = np.zeros(features)
        self.square: Doubles = np.zeros(features)
        self.count = 0

    def update(self, x: Floats, sample: str | int) -> None:
        if not len(x):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            square = np.einsum("ij,ij->j", x, x)
        require_finite_sums(square, self.tensor, sample)
        self.low, self.high = np.minimum(self.low, x.min(axis=0)), np.maximum(self.high, x.max(axis=0))
        self.magnitude += np.abs(x).sum(axis=0)
        self.square += square
        self.count += len(x)

    def merge(self, other: Self) -> None:
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.magnitude += other.magnitude
        self.square += other.square
        self.count += other.count

    def peaks(self) -> Floats:
        """max|x|"""
        require_data(self.count, self.tensor)
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def mean_magnitudes(self) -> Floats:
        """E|x|"""
        require_data(self.count, self.tensor)
        return (self.magnitude / self.count).astype(np.float32)

    def mean_squares(self) -> Floats:
        """E[x²]"""
        require_data(self.count, self.tensor)
        return (self.square / self.count).astype(np.float32)


class AverageRange:
    """The mean of each sample's lowest and of its highest value: one loud sample moves it little.

    onnxruntime calls this a moving average; unlike an exponential one it does not depend on the samples' order.
    """

    def __init__(self, tensor: str) -> None:
        self.tensor = tensor
        self.low = self.high = 0.0
        self.count = 0

    def update(self, x: Floats, sample: str | int) -> None:
        """`x` is all of one sample."""
        low, high = np.min(x), np.max(x)
        require_finite_sums(np.array([low, high]), self.tensor, sample)
        self.low += float(low)
        self.high += float(high)
        self.count += 1

    def merge(self, other: Self) -> None:
        self.low += other.low
        self.high += other.high
        self.count += other.count

    def range(self) -> tuple[float, float]:
        require_data(self.count, self.tensor)
        return self.low / self.count, self.high / self.count


def require_finite_sums(values: NDArray[np.floating], tensor: str, sample: str | int) -> None:
    if not np.isfinite(values).all():
        raise BadInputError(
            f"{tensor} is not finite, or too large to square, for sample {sample}.",
            hint="leave the sample out, or check the checkpoint on it",
        )


def require_data(count: int, tensor: str) -> None:
    if not count:
        raise BadInputError(f"No sample reached {tensor}.", hint="give samples that use this part of the model")
