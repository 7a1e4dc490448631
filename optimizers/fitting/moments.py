"""Moments that a regression needs of activations that stream by: second moments over weighted tokens.

Tokens weigh in by the inverse square of the residual stream that the regression's output joins: the norm that reads the
stream divides by its length, so that the same error hurts a token with a short stream more. It also keeps the few
tokens with massive activations (Sun et al. 2024), thousands of times longer than others, from being all that is fitted.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Doubles, Floats
from onnxpress.errors import UnsupportedModelError
from onnxpress.optimizers.fitting.statistics import ROWS, require_data, require_finite_sums


class StreamLengths:
    """The squared length of each token's residual stream; where it comes in several parts, of all of them."""

    def __init__(self) -> None:
        self._squares: dict[int, Floats] = {}

    def update(self, x: Floats, sample: int) -> None:
        squares = np.einsum("ij,ij->i", x, x)
        self._squares[sample] = squares + self._squares.get(sample, np.float32(0))

    def weights(self, sample: int, tokens: int) -> Floats:
        """1 / |stream|² by token. UnsupportedModelError where the stream has other tokens than what is weighted."""
        squares = self._squares.get(sample, np.ones(0, np.float32))
        if len(squares) != tokens:
            raise UnsupportedModelError(f"{tokens} tokens are to be weighted; the residual stream has {len(squares)}")
        weights: Floats = (1 / np.maximum(squares, np.finfo(np.float32).tiny)).astype(np.float32)
        return weights


class Moments:
    """E[x xᵀ] and E[x], [features, features] and [features], over weighted tokens."""

    def __init__(self, features: int, tensor: str, lengths: StreamLengths | None = None) -> None:
        self.tensor, self.lengths = tensor, lengths
        self.total: Doubles = np.zeros((features, features))
        self.sum: Doubles = np.zeros(features)
        self.weight, self.tokens = 0.0, 0

    def update(self, x: Floats, sample: int) -> None:
        weights = np.ones(len(x), np.float32) if self.lengths is None else self.lengths.weights(sample, len(x))
        for start in range(0, len(x), ROWS):
            root = np.sqrt(weights[start : start + ROWS])[:, None]
            rows = x[start : start + ROWS] * root
            with np.errstate(over="ignore", invalid="ignore"):
                product = rows.T @ rows
            require_finite_sums(np.diagonal(product), self.tensor, sample)
            self.total += product
            self.sum += (rows.T @ root)[:, 0]
            self.weight += float(np.square(root).sum(dtype=np.float64))
        self.tokens += len(x)

    def second(self) -> Doubles:
        require_data(int(self.weight > 0), self.tensor)
        return self.total / self.weight

    def scale(self) -> float:
        """The factor from a mean square over weighted tokens to parts of the stream's, which layers compare by."""
        require_data(self.tokens, self.tensor)
        return self.weight / self.tokens

    def mean(self) -> Doubles:
        require_data(int(self.weight > 0), self.tensor)
        return self.sum / self.weight

    def covariance(self) -> Doubles:
        return self.second() - np.outer(self.mean(), self.mean())

    def augmented(self) -> Doubles:
        """E[(x, 1)(x, 1)ᵀ], [features + 1, features + 1]."""
        mean = self.mean()
        return np.block([[self.second(), mean[:, None]], [mean[None], np.ones((1, 1))]])
