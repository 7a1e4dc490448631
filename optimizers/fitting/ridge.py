"""Ridge regression of a product's weight from moments alone, shrunk towards a prior; held-out error picks how much.

    min over W of  E|x·W − t|² + Σⱼ λⱼ |Wⱼ − Pⱼ|²,    λⱼ = ridge · E[xⱼ²]

The penalty of each input feature is in proportion to its second moment, so that the answer does not depend on how a
feature is scaled. Where the prior reaches the target already, it is the answer for any ridge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from onnxpress.arrays import Doubles, Floats

FLOOR = 1e-12
"""The least penalty, times the mean second moment, for features that are always zero."""


ROUNDING = 1e-6
"""What sums of float32 products resolve, in parts of a second moment; gains below it,
in parts of Σ|t|², are rounding."""


def penalties(second: Doubles, ridge: float, raw: Doubles | None = None) -> Doubles:
    """λ [features] of E[xxᵀ] [features, features].

    Args:
        raw: E[xⱼ²] [features] where `second` is around the mean: what is around a mean much larger than it is known
            only as well as the mean's square.
    """
    diagonal = np.diagonal(second)
    penalty: Doubles = ridge * diagonal + FLOOR * max(float(diagonal.mean()), np.finfo(np.float64).tiny)
    return penalty if raw is None else penalty + ROUNDING * raw


def solve(second: Doubles, cross: Doubles, prior: Doubles, penalty: Doubles) -> Doubles:
    """W [features, outputs] of E[xxᵀ], E[xtᵀ] [features, outputs], a prior of W's shape and λ [features]."""
    penalized = second + np.diag(penalty)
    # Scaled to a diagonal of ones first: the moments of channels lie ten orders of magnitude apart.
    scale = 1 / np.sqrt(np.diagonal(penalized))
    right = scale[:, None] * (cross + penalty[:, None] * prior)
    return scale[:, None] * np.linalg.solve(scale[:, None] * penalized * scale, right)


@dataclass
class Normal:
    """Sums over tokens: Σ x xᵀ [n, n], Σ x tᵀ [n, m] and Σ |t|²."""

    second: Doubles
    cross: Doubles
    square: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, features: int, outputs: int) -> Self:
        return cls(np.zeros((features, features)), np.zeros((features, outputs)))

    def add(self, x: Floats, target: Floats) -> None:
        """Take in rows [tokens, n] and what they should give, [tokens, m]."""
        self.second += x.T @ x
        self.cross += x.T @ target
        self.square += float(np.square(target, dtype=np.float64).sum())
        self.tokens += len(x)

    def __add__(self, other: Normal) -> Normal:
        return Normal(
            self.second + other.second, self.cross + other.cross, self.square + other.square, self.tokens + other.tokens
        )

    def error(self, weight: Doubles) -> float:
        """Σ |x·W − t|², not below zero."""
        total = self.square + float(np.sum(weight * (self.second @ weight - 2 * self.cross)))
        return max(total, 0.0)


@dataclass(frozen=True)
class Fit:
    """The verdict of held-out tokens, and the weight."""

    weight: Doubles
    """[n, m]; the one that was there, if nothing is better on held-out tokens."""
    prior: str | None
    """The name of the prior that was best; None if the weight stays."""
    ridge: float
    before: float
    """Held-out Σ|x·W − t|² of the weight that was there,"""
    after: float
    """and of the best that the other tokens gave."""


def fit(
    train: Normal, held_out: Normal, current: Doubles, priors: Mapping[str, Doubles], ridges: Sequence[float]
) -> Fit:
    """The prior and ridge that do best on held-out tokens; then the same regression on all tokens.

    Args:
        current: the weight [n, m] that is there.
        priors: by name, each [n, m].
    """
    before = held_out.error(current)
    best = Fit(current, None, 0.0, before, before)
    for name, prior in priors.items():
        for ridge in ridges:
            error = held_out.error(solve(train.second, train.cross, prior, penalties(train.second, ridge)))
            if error < min(best.after, before - ROUNDING * held_out.square):
                best = Fit(current, name, ridge, before, error)
    if best.prior is None:
        return best
    every = train + held_out
    weight = solve(every.second, every.cross, priors[best.prior], penalties(every.second, best.ridge))
    return Fit(weight, best.prior, best.ridge, before, best.after)
