"""Activation quantization error: how much the products of an activation lose when it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxpress.graph.linear import Linear, read_rows
from onnxpress.optimizers.fitting.statistics import TINY

Quantize = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class ActivationError:
    """|q(x)·W − x·W|² / |x·W|² of products that read the same activation, averaged over tokens, for each q."""

    def __init__(self, linears: Sequence[Linear], *quantizers: Quantize) -> None:
        """`quantizers`: each takes an activation [tokens, features] to codes and back."""
        self.linears, self.quantizers = linears, quantizers
        self.samples: list[NDArray[np.float64]] = []

    def update(self, x: NDArray[np.float32], sample: int) -> None:
        differences = [quantize(x) - x for quantize in self.quantizers]
        spoiled, whole = np.zeros((len(differences), len(x))), np.zeros(len(x))
        for linear in self.linears:
            weight = read_rows(linear).T
            whole += np.square(x @ weight).sum(axis=1)
            for errors, difference in zip(spoiled, differences, strict=True):
                errors += np.square(difference @ weight).sum(axis=1)
        self.samples.append((spoiled / np.maximum(whole, TINY)).mean(axis=1))

    @property
    def errors(self) -> list[float]:
        """The mean of all samples, for each quantizer."""
        return [float(error) for error in np.mean(self.samples, axis=0)]
