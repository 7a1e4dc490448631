"""Attention sinks: tokens that attend to nothing but themselves, as the first of a text does.

Samples have few of them, one in so many hundred tokens, so that a fit forgets them, while every short text begins with
them. What heads compute of such a token needs no attention: z_h = value_g of its own hidden state x, so that moments of
x tell all: E[z zᵀ] = Pᵀ E[x xᵀ] P, with P the values of all heads side by side. A share of the fit is given to all
tokens of the samples as if each stood alone.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Doubles
from onnxpress.optimizers.fitting.ridge import Normal
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights


def mixed_moments(seen: Doubles, weights: AttentionWeights, hidden: Doubles, share: float) -> Doubles:
    """E[(z, 1)(z, 1)ᵀ] where a share of the tokens stands alone.

    Args:
        seen: of the samples, [heads · head_dim + 1] squared.
        hidden: E[(x, 1)(x, 1)ᵀ], [hidden + 1] squared.
    """
    states = _states(weights)
    found: Doubles = (1 - share) * seen + share * states.T @ hidden @ states
    return found


def mixed_sums(
    seen: Normal, weights: AttentionWeights, original: AttentionWeights, hidden: Doubles, share: float
) -> Normal:
    """Sums for a refit of `weights` to the outputs of `original`, of (z, 1), where a share of the tokens stands alone.

    Args:
        seen: of the samples, where the last of z is always 1.
        hidden: see `mixed_moments`.
    """
    states = _states(weights)
    wanted = _states(original) @ np.vstack([original.output.reshape(-1, original.output.shape[2]), original.offset])
    # Of a single token, times as many as make up the share.
    count = float(seen.second[-1, -1]) * share / (1 - share)
    return Normal(
        seen.second + count * states.T @ hidden @ states,
        seen.cross + count * states.T @ hidden @ wanted,
        seen.square + count * float(np.sum(wanted * (hidden @ wanted))),
        seen.tokens,
    )


def _states(weights: AttentionWeights) -> Doubles:
    """P, [hidden + 1, heads · head_dim + 1], with (z, 1) = (x, 1) P."""
    values = np.repeat(weights.value, weights.group, axis=1).reshape(len(weights.value), -1)
    one = np.zeros((len(values), 1))
    one[-1] = 1
    return np.concatenate([values, one], axis=1)
