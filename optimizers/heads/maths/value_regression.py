"""Regression of values and output, for the heads that stay, on the output of the whole attention.

Head h adds a_h · M_h to the output, a_h being the mixture of hidden states that it attends to and M_h = value_h O_h.
Of the heads that stay, any M of rank head_dim can be had. It is found in three steps: a ridge regression of the
original output on the a_h of these heads, held where heads take over from the ones that attend most like them
(M_h + Σ M_removed); its best approximation of rank head_dim as far as the a_h tell; the output refitted to that.

Heads that share a value get one: the best approximation of their M side by side, [M_1 M_2 …] = value · [O_1 O_2 …], as
far as their a tell on average.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Doubles, Indices
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.head_dim import roots
from onnxpress.optimizers.heads.maths.output_refit import OutputSums


class HeadProducts:
    """Σ over tokens and features of a_g · a_h for all pairs of heads; an accumulator of [tokens, heads · features]."""

    def __init__(self, heads: int) -> None:
        self.total: Doubles = np.zeros((heads, heads))

    def update(self, x: NDArray[np.float32], sample: int) -> None:
        heads = len(self.total)
        by_head = x.reshape(len(x), heads, -1).transpose(1, 0, 2).reshape(heads, -1)
        self.total += by_head @ by_head.T


def successors(products: Doubles, kept: Indices) -> Indices:
    """For each head the position in `kept` of the one nearest to it, [heads]; those kept are nearest to themselves."""
    norms = np.diagonal(products)
    distances = norms[:, None] + norms[None] - 2 * products
    nearest: Indices = distances[:, kept].argmin(axis=1)
    nearest[kept] = np.arange(len(kept))
    return nearest


def cluster_sums(weights: AttentionWeights, kept: Indices, nearest: Indices) -> Doubles:
    """value_h O_h of each head that is kept plus those of the heads that it takes over from, [kept, hidden, out]."""
    sums = np.zeros((len(kept), len(weights.value) - 1, weights.output.shape[2]))
    for head, successor in enumerate(nearest):
        sums[successor] += weights.value[:-1, head // weights.group] @ weights.output[head]
    return sums


def regress_values(sums: OutputSums, prior: Doubles, kv_heads: int, size: int, ridge: float) -> tuple[Doubles, Doubles]:
    """value [hidden, kv_heads, size] and O [kept, size, out] of the heads that stay, the first two steps of the module.

    Args:
        sums: of a of the heads that stay, side by side, [kept · hidden].
        prior: cluster sums, [kept, hidden, out].
        kv_heads: how many values the heads that stay share, in equal runs.
        ridge: of the regression.
    """
    kept, hidden, out = prior.shape
    group = kept // kv_heads
    full = sums.solve(prior.reshape(-1, out), ridge).reshape(kept, hidden, out)
    value, output = np.zeros((hidden, kv_heads, size)), np.zeros((kept, size, out))
    for kv_head in range(kv_heads):
        members = range(kv_head * group, (kv_head + 1) * group)
        rows = [slice(head * hidden, (head + 1) * hidden) for head in members]
        root, inverse = roots(sum(sums.gram[part, part] for part in rows) / group)
        left, values, right = np.linalg.svd(root @ np.concatenate(full[members], axis=1), full_matrices=False)
        rank = min(size, len(values))
        weight = np.sqrt(values[:rank])
        value[:, kv_head, :rank] = inverse @ left[:, :rank] * weight
        output[members, :rank] = (weight[:, None] * right[:rank]).reshape(rank, group, out).transpose(1, 0, 2)
    return value, output
