"""The output product refitted to what the attention put out before it was cut, from sums over weighted tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxpress.arrays import Doubles
from onnxpress.optimizers.fitting.ridge import Normal, penalties, solve
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights


@dataclass(frozen=True)
class OutputSums:
    """Sums over x that end in a 1 and the outputs y that are wanted."""

    gram: Doubles
    """E[x xᵀ], or the covariance where a bias takes up what is constant, [features, features]."""
    cross: Doubles
    """E[x yᵀ], likewise, [features, out]."""
    raw: Doubles
    """E[x²], [features]"""
    mean: Doubles
    """E[x], [features]"""
    wanted: Doubles
    """E[y], [out]"""

    @classmethod
    def of(cls, normal: Normal, *, centred: bool) -> OutputSums:
        """From normal equations whose last feature is always 1."""
        second, cross = normal.second / normal.second[-1, -1], normal.cross / normal.second[-1, -1]
        mean, wanted = second[-1, :-1], cross[-1]
        gram = second[:-1, :-1] - centred * np.outer(mean, mean)
        return cls(gram, cross[:-1] - centred * np.outer(mean, wanted), np.diagonal(second)[:-1], mean, wanted)

    def solve(self, prior: Doubles, ridge: float) -> Doubles:
        """The ridge regression of y on x, towards a prior [features, out]."""
        return solve(self.gram, self.cross, prior, penalties(self.gram, ridge, self.raw))


def refit_output(weights: AttentionWeights, normal: Normal, ridge: float, *, centred: bool) -> AttentionWeights:
    """The output fitted to what was wanted.

    Args:
        normal: of what the output product reads by now, and a 1, against the output as it was.
        ridge: how strongly it is held where it is, in parts of each input's second moment.
        centred: whether there is a bias to fit, too.
    """
    sums = OutputSums.of(normal, centred=centred)
    output = sums.solve(weights.output.reshape(-1, weights.output.shape[2]), ridge)
    offset = sums.wanted - sums.mean @ output if centred else weights.offset
    return replace(weights, output=output.reshape(weights.output.shape), offset=offset)


def output_error(weights: AttentionWeights, normal: Normal) -> float:
    """E|z O + offset − y|² / E|y|² of the same sums."""
    weight = np.vstack([weights.output.reshape(-1, weights.output.shape[2]), weights.offset])
    return normal.error(weight) / max(normal.square, float(np.finfo(np.float64).tiny))
