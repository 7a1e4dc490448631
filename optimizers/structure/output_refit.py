"""Moments of what attention hands to its output product, and that product refitted to them.

    min_W  E|z W + b − y|² + λ |W − prior|²,    λ = ridge · mean E[z_i²]

Ridge regression towards a prior rather than to zero: with little data, what is not known stays as it was.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxpress.optimizers.quantization.statistics import Gram

Doubles = NDArray[np.float64]
TINY = 1e-12


class Moments:
    """Mean and second moments of an activation; an accumulator. Memory: (features + 1)² float64.

    Sums are taken around the mean of the first sample, so that little is lost where an activation hardly varies.
    """

    def __init__(self, features: int, tensor: str) -> None:
        self.gram = Gram(features + 1, tensor)
        self.origin: NDArray[np.float32] | None = None

    def update(self, x: NDArray[np.float32], sample: str | int) -> None:
        if not len(x):
            return
        if self.origin is None:
            self.origin = x.mean(axis=0)
        self.gram.update(np.column_stack([x - self.origin, np.ones(len(x), np.float32)]), sample)

    def mean(self) -> Doubles:
        """E[x], [features]"""
        mean: Doubles = self.gram.matrix()[-1, :-1]
        return mean if self.origin is None else mean + self.origin

    def second(self, *, centred: bool) -> Doubles:
        """E[x xᵀ], or the covariance, [features, features]."""
        whole = self.gram.matrix()
        away = whole[-1, :-1]
        moments: Doubles = whole[:-1, :-1] - np.outer(away, away)
        return moments if centred else moments + np.outer(self.mean(), self.mean())

    def augmented(self) -> Doubles:
        """E[(x, 1)(x, 1)ᵀ], [features + 1, features + 1]."""
        mean = self.mean()
        return np.block([[self.second(centred=False), mean[:, None]], [mean[None], np.ones((1, 1))]])


def refit(gram: Doubles, cross: Doubles, prior: Doubles, ridge: float) -> Doubles:
    """W [features, out] of the module's formula, without b.

    Args:
        gram: E[z zᵀ], [features, features]; centred where there is a bias b.
        cross: E[z yᵀ], [features, out], likewise.
        prior: [features, out].
    """
    return prior + np.linalg.solve(gram + penalty(gram, ridge), cross - gram @ prior)


def penalty(gram: Doubles, ridge: float) -> Doubles:
    """λ I, never quite zero."""
    level = float(np.trace(gram)) / len(gram)
    return np.eye(len(gram)) * max(ridge * level, TINY * level, np.finfo(np.float64).tiny * 1e16)


def remaining_error(gram: Doubles, cross: Doubles, target: float, weight: Doubles) -> float:
    """E|z W − y|² / E|y|², given target = E|y|²."""
    error = target - 2 * float(np.sum(cross * weight)) + float(np.sum((gram @ weight) * weight))
    return max(error, 0.0) / max(target, np.finfo(np.float64).tiny)
