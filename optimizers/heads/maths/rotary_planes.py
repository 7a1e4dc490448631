"""Rotary positions turn pairs of dimensions, each at a frequency of its own: what may be done to queries and keys.

A pair, or plane, seen as a complex number is multiplied by e^(i·position·frequency). Only a complex factor commutes
with that, so that dimensions of a head must not be mixed: planes can be kept or dropped, with the columns of the tables
of cosines and sines that belong to them. All heads that read one table keep the same planes. Heads may be mixed freely.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Doubles, Indices


def plane_dimensions(head_dim: int, *, interleaved: bool) -> Indices:
    """Which two dimensions make up each plane, [planes, 2]: neighbours, or the same of both halves."""
    dimensions = np.arange(head_dim)
    return dimensions.reshape(-1, 2) if interleaved else dimensions.reshape(2, -1).T


def kept_dimensions(planes: Indices, head_dim: int, *, interleaved: bool) -> Indices:
    """The dimensions of these planes, [2 · planes], in the order in which a smaller head is turned."""
    pairs = plane_dimensions(head_dim, interleaved=interleaved)[planes]
    kept: Indices = (pairs if interleaved else pairs.T).reshape(-1)
    return kept


def plane_energies(queries: Doubles, keys: Doubles, *, interleaved: bool) -> Doubles:
    """The share of each plane in squared scores, Σ_heads E|q_p|² E|k_p|², [planes].

    Args:
        queries: E[q²], [heads, head_dim].
        keys: E[k²], [kv_heads, head_dim].
    """
    pairs = plane_dimensions(queries.shape[1], interleaved=interleaved)
    shared = np.repeat(keys, len(queries) // len(keys), axis=0)
    energies: Doubles = (queries[:, pairs].sum(axis=2) * shared[:, pairs].sum(axis=2)).sum(axis=0)
    return energies


def strongest_planes(energies: Doubles, count: int) -> Indices:
    """The planes with the highest energies, ascending."""
    return np.sort(np.argsort(-energies, kind="stable")[:count])
