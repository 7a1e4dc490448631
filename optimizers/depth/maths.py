"""Fewer layers, the maths: which layers do least, what stands in for those that go.

influence          1 − cos(x_in, x_out) of each layer                              ShortGPT, Men et al. 2024
angular distance   arccos(cos(x_l, x_{l+n})) / π of n layers in a row              Gromov et al. 2024
merging            W_l + Σ_k (W_{l+k} − W_l)                                       LaCo, Yang et al. 2024
linear patch       the least-squares linear map that makes up for a run of layers  cf. ReplaceMe, Shopkhoev et al. 2025
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Doubles, Floats
from onnxpress.optimizers.fitting.statistics import TINY

Merge = Literal["merge", "average"]

RIDGES = tuple(10.0**power for power in range(-6, 1))
"""Tried, times the mean of the Gram matrix's diagonal."""


def cosines(first: NDArray[np.floating], second: NDArray[np.floating]) -> Doubles:
    """cos of each row of one [rows, features] with the same row of the other, [rows]; 1 where both are zero."""
    one, two = first.astype(np.float64), second.astype(np.float64)
    squares = np.einsum("ij,ij->i", one, one), np.einsum("ij,ij->i", two, two)
    found = np.einsum("ij,ij->i", one, two) / np.sqrt(np.maximum(squares[0] * squares[1], TINY))
    both_zero = (squares[0] == 0) & (squares[1] == 0)
    return np.where(both_zero, 1.0, np.clip(found, -1.0, 1.0))


def influence(before: NDArray[np.floating], after: NDArray[np.floating]) -> Doubles:
    """How far a layer turns each token, from 0 to 2: 1 − cos(x_in, x_out), [rows]."""
    return 1.0 - cosines(before, after)


def angular_distance(before: NDArray[np.floating], after: NDArray[np.floating]) -> Doubles:
    """The angle between the states before and after some layers, from 0 to 1 (opposite), [rows]."""
    return np.arccos(cosines(before, after)) / np.pi


def divergence(reference: NDArray[np.floating], candidate: NDArray[np.floating]) -> Doubles:
    """KL(reference ‖ candidate) of softmax over the last axis, in nats, of logits [rows, vocabulary]: [rows]."""
    expected, found = _log_softmax(reference), _log_softmax(candidate)
    return np.asarray((np.exp(expected) * (expected - found)).sum(axis=-1))


def _log_softmax(logits: NDArray[np.floating]) -> Doubles:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """The indices of the `count` lowest scores, ascending; of equal ones the later, which fewer layers build on."""
    order = sorted(range(len(scores)), key=lambda index: (scores[index], -index))
    return sorted(order[:count])


def runs(indices: Sequence[int]) -> list[list[int]]:
    """Indices as runs of neighbours: [2, 3, 7] -> [[2, 3], [7]]."""
    found: list[list[int]] = []
    for index in sorted(indices):
        if found and found[-1][-1] == index - 1:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def merge_coefficients(method: Merge, removed: int) -> list[float]:
    """Coefficients of a layer and of `removed` neighbours in the layer that takes their place; their sum is 1.

    merge: W + Σ (W_k − W), so that the layer adds what each of them would have added; average: their mean.
    """
    if method == "average":
        return [1.0 / (removed + 1)] * (removed + 1)
    return [1.0 - removed] + [1.0] * removed


def combine(arrays: Sequence[NDArray[np.floating]], coefficients: Sequence[float]) -> Floats:
    """Σ c_i W_i, summed in float64; equal arrays give themselves where the coefficients' sum is 1."""
    first = arrays[0].astype(np.float64)
    total = first * float(np.sum(coefficients))
    for array, coefficient in zip(arrays[1:], coefficients[1:], strict=True):
        total += coefficient * (array - first)
    return np.asarray(total, dtype=np.float32)


class Patch(NamedTuple):
    """A linear map that was fitted."""

    matrix: Doubles
    """[in, out]; zero where no map made anything better on data that it was not fitted to."""
    error: float
    """The share of squares left of what the map should make, on data that it was not fitted to: 1 without a map."""
    ridge: float


class CrossValidatedRegression:
    """Moments of y [rows, out] given x [rows, in], in two halves, so that each can judge what was fitted to the other.

    Memory: two float64 matrices [in, in] and two [in, out].
    """

    def __init__(self) -> None:
        self.grams: list[Doubles] = []
        self.crosses: list[Doubles] = []
        self.squares = [0.0, 0.0]

    def update(self, x: NDArray[np.floating], y: NDArray[np.floating], weights: NDArray[np.floating]) -> None:
        """Take in rows that count by `weights` [rows]: a half of them, and the other, which other texts are in."""
        if not self.grams:
            inputs, outputs = x.shape[1], y.shape[1]
            self.grams = [np.zeros((inputs, inputs)) for _ in range(2)]
            self.crosses = [np.zeros((inputs, outputs)) for _ in range(2)]
        roots = np.sqrt(weights.astype(np.float64))[:, None]
        middle = len(x) // 2
        for half, mine in enumerate((slice(0, middle), slice(middle, len(x)))):
            a, b = x[mine] * roots[mine], y[mine] * roots[mine]
            self.grams[half] += a.T @ a
            self.crosses[half] += a.T @ b
            self.squares[half] += float(np.square(b).sum())

    def solve(self, ridges: Sequence[float] = RIDGES) -> Patch:
        """argmin_A Σ w ‖x A − y‖² + λ ‖A‖², λ being the one under which each half predicts the other best."""
        total = sum(self.squares)
        if not self.grams or total == 0.0:
            size = self.crosses[0].shape if self.crosses else (0, 0)
            return Patch(np.zeros(size), 0.0, 0.0)
        errors = {
            ridge: sum(self._left(_ridge(self.grams[h], self.crosses[h], ridge), 1 - h) for h in range(2)) / total
            for ridge in ridges
        }
        best = min(errors, key=lambda ridge: (errors[ridge], ridge))
        if errors[best] >= 1.0:
            return Patch(np.zeros_like(self.crosses[0]), 1.0, best)
        return Patch(_ridge(sum(self.grams), sum(self.crosses), best), errors[best], best)  # type: ignore[arg-type]

    def _left(self, matrix: Doubles, half: int) -> float:
        """Σ w ‖x A − y‖² of a half."""
        explained = float(np.sum(matrix * (self.grams[half] @ matrix))) - 2 * float(np.sum(matrix * self.crosses[half]))
        return max(0.0, explained + self.squares[half])


def _ridge(gram: Doubles, cross: Doubles, ridge: float) -> Doubles:
    strength = max(ridge * float(np.mean(np.diagonal(gram))), TINY)
    return np.asarray(np.linalg.solve(gram + strength * np.eye(len(gram)), cross))


def before_norm(
    wanted: NDArray[np.floating], sums: NDArray[np.floating], gain: NDArray[np.floating], bias: NDArray[np.floating]
) -> Doubles:
    """Find what a LayerNorm must read to make `wanted` [rows, features], with the mean and spread of `sums`.

    gain ⊙ (s − mean) / spread + bias: only direction counts, so each token keeps the size that it has. Features whose
    gain is next to nothing keep their value.
    """
    current = sums.astype(np.float64)
    mean, spread = current.mean(axis=-1, keepdims=True), current.std(axis=-1, keepdims=True)
    weak = np.abs(gain) < 1e-3 * np.abs(gain).max()
    normal = (wanted - bias.astype(np.float64)) / np.where(weak, 1.0, gain.astype(np.float64))
    return np.asarray(np.where(weak, current, mean + spread * normal))
