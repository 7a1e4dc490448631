"""How much the products of an activation lose when it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxpress.optimizers.linear import Linear, read_rows

TINY = 1e-30
"""Smallest magnitude that is divided by: a row of zeros loses nothing."""


class Coarseness:
    """|q(x)·W − x·W|² / |x·W|² of products that read the same activation, averaged over tokens."""

    def __init__(
        self, linears: Sequence[Linear], quantize: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> None:
        """`quantize`: an activation [tokens, features] to codes and back."""
        self.linears, self.quantize = linears, quantize
        self.errors: list[float] = []

    def update(self, x: NDArray[np.float32], sample: int) -> None:
        difference = self.quantize(x) - x
        spoiled, whole = np.zeros(len(x)), np.zeros(len(x))
        for linear in self.linears:
            weight = read_rows(linear).T
            spoiled += np.square(difference @ weight).sum(axis=1)
            whole += np.square(x @ weight).sum(axis=1)
        self.errors.append(float(np.mean(spoiled / np.maximum(whole, TINY))))

    @property
    def error(self) -> float:
        """The mean of all samples."""
        return float(np.mean(self.errors))
