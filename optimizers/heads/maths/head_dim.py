"""Heads that compute in fewer dimensions, by the best bases that activations tell.

Values and output: z_h R · P O_h for any R [head_dim, new] and P = R⁺ is what a head can be cut to. With G = E[z zᵀ],
the best pair comes from the singular value decomposition U S Vᵀ of G^½ O: R = G^-½ U and P O = Uᵀ G^½ O, cut after
`new` columns.

Queries and keys without rotary positions: the scores q · k lose least, for q and k drawn apart, with U S Vᵀ of
Cq^½ Ck^½: Rq = Cq^-½ U S^½, Rk = Ck^-½ V S^½ (A³, Wong et al. 2025; CLOVER, Meng et al. 2024, without activations).
Written for weights, that is the decomposition of C^½ Wq Wkᵀ C^½. Keys count as centred: adding one vector to all keys
adds one number to all scores of a query, which softmax does not see.

Both are exact where the product has no higher rank. Heads that share keys and values share their bases.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Doubles

FLOOR = 1e-7
"""Eigenvalues below this share of the largest are rounding errors of sums in float32."""


def roots(gram: Doubles) -> tuple[Doubles, Doubles]:
    """G^½ and its pseudo-inverse, for a symmetric positive semidefinite G."""
    values, vectors = np.linalg.eigh(gram)
    real = values > FLOOR * max(float(values[-1]), 0.0)
    root = np.sqrt(np.where(real, values, 0.0))
    inverse = np.where(real, 1.0 / np.where(real, root, 1.0), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def value_bases(grams: Doubles, output: Doubles, kv_heads: int, size: int) -> tuple[Doubles, Doubles]:
    """R [kv_heads, head_dim, size] and P [kv_heads, size, head_dim] for values and output.

    Args:
        grams: E[z_h z_hᵀ] of each head, [heads, head_dim, head_dim].
        output: O, [heads, head_dim, out].
    """
    heads, head_dim, out = output.shape
    inward, outward = np.empty((kv_heads, head_dim, size)), np.empty((kv_heads, size, head_dim))
    group = heads // kv_heads
    for kv_head in range(kv_heads):
        members = slice(kv_head * group, (kv_head + 1) * group)
        root, inverse = roots(grams[members].sum(axis=0))
        joint = output[members].transpose(1, 0, 2).reshape(head_dim, group * out)
        left = np.linalg.svd(root @ joint, full_matrices=False)[0]
        left = np.pad(left, ((0, 0), (0, max(0, size - left.shape[1]))))[:, :size]
        inward[kv_head], outward[kv_head] = inverse @ left, left.T @ root
    return inward, outward


def score_bases(queries: Doubles, keys: Doubles, kv_heads: int, size: int) -> tuple[Doubles, Doubles]:
    """Rq and Rk, [kv_heads, head_dim, size] each.

    Args:
        queries: E[q_h q_hᵀ], [heads, head_dim, head_dim].
        keys: covariances of k_g, [kv_heads, head_dim, head_dim].
    """
    found_queries, found_keys = [], []
    pooled = queries.reshape(kv_heads, -1, *queries.shape[1:]).sum(axis=1)
    for query, key in zip(pooled, keys, strict=True):
        query_root, query_inverse = roots(query)
        key_root, key_inverse = roots(key)
        left, values, right = np.linalg.svd(query_root @ key_root)
        weight = np.sqrt(values[:size])
        found_queries.append(query_inverse @ left[:, :size] * weight)
        found_keys.append(key_inverse @ right[:size].T * weight)
    return np.stack(found_queries), np.stack(found_keys)


def chosen_dimensions(importance: Doubles, size: int) -> Doubles:
    """The selection [kv_heads, head_dim, size] of the most important dimensions, from [kv_heads, head_dim]."""
    kept = np.sort(np.argsort(-importance, axis=1, kind="stable")[:, :size], axis=1)
    selection: Doubles = np.eye(importance.shape[1])[:, kept].transpose(1, 0, 2)
    return selection
