"""Which channels of a feed-forward network to remove, and what the rest makes of it.

A channel is a column of `gate` and `up` and the row of `down` that reads it: z = act(gate) · up, y = z · W. The
importance of channel j, by method:

    activation      E[zⱼ²] · |Wⱼ|²
    l1, l2          sizes of the channel's weights in gate, up and down, multiplied
    taylor          |Σ gradient · weight| over the channel's weights (Molchanov et al. 2019)
    flap            Var[zⱼ] · |Wⱼ|², its mean going into a bias (An et al. 2023)
    least-squares   what its removal adds to E|y − ŷ|² once the other channels have made up for it as well as they can;
                    removed one by one, each time the cheapest (Hassibi & Stork's optimal brain surgeon, by channel)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Doubles, Floats, Indices
from onnxpress.optimizers.fitting.ridge import solve

Method = Literal["least-squares", "activation", "l1", "l2", "taylor", "flap"]
METHODS: tuple[Method, ...] = get_args(Method)
BLOCK = 64
"""Removals between two updates of the whole inverse."""


@dataclass(frozen=True)
class Removal:
    """Channels in the order in which to remove them."""

    order: Indices
    costs: Doubles
    """What is lost by then, after each removal; comparable within a method."""


def rank(scores: NDArray[np.floating], count: int) -> Removal:
    """The `count` channels of least importance [channels], least first; of equal ones the first."""
    order = np.argsort(scores, kind="stable")[:count]
    return Removal(order.astype(np.int64), np.cumsum(np.asarray(scores, np.float64)[order]))


def eliminate(second: Doubles, weight: NDArray[np.floating], count: int, penalty: Doubles) -> Removal:
    """Remove channels one by one, each time the one whose loss the others can make up for best.

    With H = E[zzᵀ] + Λ and W as the removals so far left them, removing channel j costs |Wⱼ|² / (H⁻¹)ⱼⱼ; the others
    then become W − H⁻¹[:, j] Wⱼ / (H⁻¹)ⱼⱼ, which is the ridge regression of `refit`. Time: n² · count.

    Args:
        second: E[zzᵀ] [n, n], or the covariance of z where a bias takes the mean.
        weight: W [n, m].
        count: how many to remove, fewer than n.
        penalty: Λ's diagonal [n], as `ridge.penalties` has it: above zero, so that H has an inverse.
    """
    penalized = second + np.diag(penalty)
    scale = np.sqrt(np.diagonal(penalized))
    # In units in which all channels are equally loud: the costs stay the same and the inverse is well conditioned.
    inverse = np.linalg.inv(penalized / scale / scale[:, None])
    rows = np.asarray(weight, np.float64) * scale[:, None]
    alive = np.arange(len(rows))
    order: list[int] = []
    costs: list[float] = []
    while len(order) < count:
        steps = min(BLOCK, count - len(order))
        left, right = np.zeros((len(alive), steps)), np.zeros((steps, rows.shape[1]))
        norms, diagonal = np.einsum("ij,ij->i", rows, rows), np.diagonal(inverse).copy()
        gone: list[int] = []
        for step in range(steps):
            scores = norms / diagonal
            scores[gone] = np.inf
            j = int(scores.argmin())
            column = inverse[:, j] - left[:, :step] @ left[j, :step]
            root = np.sqrt(max(column[j], np.finfo(np.float64).tiny))
            column, row = column / root, (rows[j] - left[j, :step] @ right[:step]) / root
            projection = rows @ row - left[:, :step] @ (right[:step] @ row)
            norms = np.maximum(norms - 2 * column * projection + np.square(column) * (row @ row), 0)
            diagonal = np.maximum(diagonal - np.square(column), np.finfo(np.float64).tiny)
            left[:, step], right[step] = column, row
            gone.append(j)
            order.append(int(alive[j]))
            costs.append(float(row @ row))
        stays = np.setdiff1d(np.arange(len(alive)), gone)
        inverse -= left @ left.T
        inverse = inverse[np.ix_(stays, stays)]
        rows, alive = (rows - left @ right)[stays], alive[stays]
    return Removal(np.array(order, np.int64), np.cumsum(costs))


def refit(second: Doubles, weight: NDArray[np.floating], kept: Indices, penalty: Doubles) -> Doubles:
    """The rows of `down` [kept, m] whose output is closest to what all channels gave, shrunk towards what they were.

    Keeping all changes nothing; a channel that is a combination of kept ones is merged into them, up to the penalty.
    """
    before: Doubles = np.asarray(weight, np.float64)
    return solve(second[np.ix_(kept, kept)], second[kept] @ before, before[kept], penalty[kept])


def compensation(mean: Doubles, weight: NDArray[np.floating], kept: Indices, after: NDArray[np.floating]) -> Doubles:
    """The bias [m] that keeps the mean output: E[z]·W less what the kept channels give by now."""
    return mean @ np.asarray(weight, np.float64) - mean[kept] @ np.asarray(after, np.float64)


def error(second: Doubles, weight: NDArray[np.floating], kept: Indices, after: NDArray[np.floating]) -> float:
    """E|y − ŷ|² / E|y|²; 0 where there is no output."""
    weight = np.asarray(weight, np.float64)
    difference = weight.copy()
    difference[kept] -= after
    total = float(np.sum(weight * (second @ weight)))
    return float(np.sum(difference * (second @ difference))) / total if total > 0 else 0.0


def importance_by_activation(second: Doubles, down: NDArray[np.floating]) -> Doubles:
    found: Doubles = np.diagonal(second) * np.square(np.linalg.norm(down, axis=1))
    return found


def importance_by_fluctuation(second: Doubles, mean: Doubles, down: NDArray[np.floating]) -> Doubles:
    variance = np.maximum(np.diagonal(second) - np.square(mean), 0)
    found: Doubles = variance * np.square(np.linalg.norm(down, axis=1))
    return found


def importance_by_magnitude(order: int, down: NDArray[np.floating], into: Sequence[NDArray[np.floating]]) -> Doubles:
    """Norms of order 1 or 2: of rows of `down` [n, m] times those of columns of each of `into` [hidden, n]."""
    found: Doubles = np.linalg.norm(down, ord=order, axis=1).astype(np.float64)
    for weight in into:
        found = found * np.linalg.norm(weight, ord=order, axis=0)
    return found


def importance_by_gradient(
    down: tuple[Floats, Floats],
    into: Sequence[tuple[Floats, Floats]],
) -> Doubles:
    """|Σ g·w| of each channel; weights and their gradients as in `importance_by_magnitude`."""
    total = np.einsum("ij,ij->i", *down, dtype=np.float64)
    for weight, gradient in into:
        total = total + np.einsum("ij,ij->j", weight, gradient, dtype=np.float64)
    found: Doubles = np.abs(total)
    return found
