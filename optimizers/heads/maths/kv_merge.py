"""Fewer key/value heads for the same query heads: multi-head attention becomes grouped, groups become larger.

Ainslie et al. (2023) average the heads of a group and train. Heads compute in bases of their own, though, so that their
average is no average of what they mean. Here they are turned towards each other first, which changes nothing by itself:
values by any orthogonal map, which the output undoes, keys by what queries can undo, too: any orthogonal map, or a
rotation and scale of each plane where positions are rotary. Maps are found by generalized Procrustes analysis (Gower
1975) on what the heads compute, given as E[x xᵀ] of all heads side by side.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Doubles
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.rotary_planes import plane_dimensions

ROUNDS = 8
"""Rounds of turning each head towards the mean of its cluster."""


def clusters(keys: Doubles, values: Doubles, size: int) -> list[list[int]]:
    """Heads in clusters of `size` that are alike once turned; each list ascends.

    Args:
        keys, values: E[x_g x_hᵀ], [kv_heads, head_dim, kv_heads, head_dim].
    """
    alike = _alikeness(keys) + _alikeness(values)
    left, found = list(range(len(alike))), []
    while left:
        first = left.pop(0)
        nearest = sorted(left, key=lambda head: -alike[first, head])[: size - 1]
        left = [head for head in left if head not in nearest]
        found.append(sorted([first, *nearest]))
    return found


def turn_heads(moments: Doubles, cluster: list[int]) -> Doubles:
    """Orthogonal R of each head of a cluster, so that all x_h R_h agree best, [heads, head_dim, head_dim]."""
    maps = np.repeat(np.eye(moments.shape[1])[None], len(cluster), axis=0)
    part = moments[np.ix_(cluster, range(moments.shape[1]), cluster, range(moments.shape[3]))]
    for round_number in range(ROUNDS):
        for head in range(1, len(cluster)):
            others = range(1) if round_number == 0 else [other for other in range(len(cluster)) if other != head]
            towards = sum(part[head, :, other] @ maps[other] for other in others)
            left, _, right = np.linalg.svd(towards)
            maps[head] = left @ right
    return maps


def turn_planes(moments: Doubles, cluster: list[int], *, interleaved: bool) -> tuple[Doubles, Doubles]:
    """A rotation and scale of each plane of each head, [heads, head_dim, head_dim], and what undoes it in queries.

    The first head of the cluster sets the scale.
    """
    head_dim = moments.shape[1]
    pairs = plane_dimensions(head_dim, interleaved=interleaved)
    maps, undo = np.zeros((2, len(cluster), head_dim, head_dim))
    for first, second in pairs:
        factors = _plane_factors(moments, cluster, int(first), int(second))
        for one, factor in enumerate(factors):
            for matrix, number in ((maps[one], factor), (undo[one], 1 / np.conj(factor))):
                matrix[first, first] = matrix[second, second] = number.real
                matrix[first, second], matrix[second, first] = number.imag, -number.imag
    return maps, undo


def merge(
    weights: AttentionWeights, keys: Doubles, values: Doubles, kv_heads: int, *, rotary: bool, interleaved: bool
) -> AttentionWeights:
    """Clusters of key/value heads turned and averaged; query heads and rows of O move along and are turned back.

    Args:
        keys, values: E[x_g x_hᵀ] before positions are applied, [kv_heads, head_dim, kv_heads, head_dim].
        kv_heads: a divisor of those of `weights`.
    """
    size = weights.kv_heads // kv_heads
    found = clusters(keys, values, size)
    queries, merged_keys, merged_values, outputs = [], [], [], []
    for cluster in found:
        key_maps, query_maps = (
            turn_planes(keys, cluster, interleaved=interleaved) if rotary else (turn_heads(keys, cluster),) * 2
        )
        value_maps = turn_heads(values, cluster)
        merged_keys.append(np.einsum("ihd,hde->ie", weights.key[:, cluster], key_maps) / size)
        merged_values.append(np.einsum("ihd,hde->ie", weights.value[:, cluster], value_maps) / size)
        for place, head in enumerate(cluster):
            members = slice(head * weights.group, (head + 1) * weights.group)
            queries.append(weights.query[:, members] @ query_maps[place])
            outputs.append(value_maps[place].T @ weights.output[members])
    return replace(
        weights,
        query=np.concatenate(queries, axis=1),
        key=np.stack(merged_keys, axis=1),
        value=np.stack(merged_values, axis=1),
        output=np.concatenate(outputs),
    )


def _alikeness(moments: Doubles) -> Doubles:
    """How much of two heads agrees once one is turned: the nuclear norm of their cross moments over their norms."""
    heads = len(moments)
    norms = np.sqrt([np.trace(moments[head, :, head]) for head in range(heads)]) + np.finfo(np.float64).tiny
    nuclear = np.array([[np.linalg.norm(moments[a, :, b], "nuc") for b in range(heads)] for a in range(heads)])
    alike: Doubles = nuclear / np.outer(norms, norms)
    return alike


def _plane_factors(moments: Doubles, cluster: list[int], first: int, second: int) -> NDArray[np.complex128]:
    """A complex number for each head, so that all c_h x_h agree best in one plane: x = x_first + i x_second."""
    part = moments[np.ix_(cluster, [first, second], cluster, [first, second])]
    # E[x_a conj(x_b)]
    inner = part[:, 0, :, 0] + part[:, 1, :, 1] + 1j * (part[:, 1, :, 0] - part[:, 0, :, 1])
    norms = np.sqrt(np.maximum(np.diagonal(inner).real, np.finfo(np.float64).tiny))
    scale = np.clip(norms[0] / norms, 1e-3, 1e3)
    factors: NDArray[np.complex128] = scale.astype(np.complex128)
    for round_number in range(ROUNDS):
        for head in range(1, len(cluster)):
            others = [0] if round_number == 0 else [other for other in range(len(cluster)) if other != head]
            towards = sum(factors[other] * np.conj(inner[head, other]) for other in others)
            size = abs(towards)
            factors[head] = scale[head] * (towards / size if size > 0 else 1.0)
    return factors
