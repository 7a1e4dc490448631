"""A product as two thinner ones, x W ≈ (x A) B, with the least error on the inputs that it gets.

For E[x xᵀ] = L Lᵀ and the singular vectors V of Lᵀ W, E|x (W − A B)|² is least for A = W Vᵣ, B = Vᵣᵀ, r of them;
what is lost is the sum of the squares of the other singular values (Eckart and Young, in the norm of the inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from onnxpress.arrays import AnyFloats, Doubles

RIDGE = 1e-6
"""A share of the mean energy of an input: directions that no sample showed still count a little."""


class Spectrum(NamedTuple):
    """Directions of what a product makes, and how much of it lies along each; largest first."""

    energies: Doubles
    """[min(in, out)]"""
    directions: Doubles
    """Vᵀ [min(in, out), out]"""


def spectrum_of(weight: AnyFloats, moments: Doubles | None) -> Spectrum:
    """Spectrum of x W for inputs of these moments [in, in]; None: inputs that are alike in all directions."""
    matrix = np.asarray(weight, np.float64)
    if moments is not None:
        ridge = RIDGE * float(np.trace(moments)) / len(moments) or 1.0
        # Any root will do. Cholesky's would fail where fewer tokens than features were seen and one is massive.
        powers, axes = np.linalg.eigh(moments + ridge * np.eye(len(moments)))
        matrix = np.sqrt(np.maximum(powers, ridge))[:, None] * (axes.T @ matrix)
    _, values, directions = np.linalg.svd(matrix, full_matrices=False)
    return Spectrum(np.square(values), directions)


def factors(weight: AnyFloats, directions: AnyFloats, rank: int) -> tuple[Doubles, Doubles]:
    """A [in, rank] and B [rank, out]."""
    kept = np.asarray(directions[:rank], np.float64)
    return np.asarray(weight, np.float64) @ kept.T, kept


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank at which two factors have fewer parameters than one matrix [in, out]; 0 if there is none."""
    return (shape[0] * shape[1] - 1) // (shape[0] + shape[1])


def allocate(energies: Sequence[Doubles], shapes: Sequence[tuple[int, int]], parameters: float) -> list[int | None]:
    """Ranks for products that together keep at most this many parameters; None leaves a product whole.

    A rank is kept where the share of its product's energy that it holds, for each of its parameters, is above a level
    that is the same for all products; the lowest level that fits is found by bisection. Where not even one rank each
    fits, all get one.
    """
    values = [
        found / max(float(found.sum()), np.finfo(float).tiny) / sum(shape)
        for found, shape in zip(energies, shapes, strict=True)
    ]

    def ranks(level: float) -> list[int | None]:
        counts = [max(1, int(np.count_nonzero(found > level))) for found in values]
        return [None if count > break_even(shape) else count for count, shape in zip(counts, shapes, strict=True)]

    low, high = 0.0, max((float(found[0]) for found in values), default=0.0)
    if count_parameters(ranks(low), shapes) <= parameters:
        return ranks(low)
    for _ in range(80):
        middle = (low + high) / 2 if low == 0 else float(np.sqrt(low * high))
        low, high = (middle, high) if count_parameters(ranks(middle), shapes) > parameters else (low, middle)
    return ranks(high)


def count_parameters(ranks: Sequence[int | None], shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of products of these ranks."""
    return sum(
        shape[0] * shape[1] if rank is None else rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True)
    )
