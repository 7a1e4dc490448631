"""Heads resampled by matrices: the formula that founded this project, and what it takes to make it right.

With wq, wk, wv and the transposed wo seen as [hidden, heads, head_dim], each is multiplied by a [head_dim, d'] matrix D
and a [heads, h'] matrix A whose columns sum to one: each new head is an average. For wv and wo both, that shrinks the
output by about the size of what was averaged. So one side averages and the other **sums**: O takes the rows of A and D
scaled to sum to one, so that what a head did is handed out whole. Then heads with the same attention merge exactly, as
do dimensions with the same values. Queries average dimensions, and keys sum them, for the same reason.

Rotary positions do not allow dimensions of queries and keys to be mixed: see `rotary_planes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxpress.arrays import Doubles
from onnxpress.errors import UsageError
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.request import HeadPlan


@dataclass(frozen=True)
class Resampling:
    """Matrices whose columns sum to one."""

    heads: Doubles
    """[heads, h'], of queries and output."""
    kv_heads: Doubles
    """[kv_heads, k'], of keys and values."""
    head_dim: Doubles
    """[head_dim, d']"""


def average_matrix(size: int, new: int) -> Doubles:
    """[size, new]: each column averages the same share of neighbours; a fraction of one where sizes do not divide."""
    edges = np.arange(new + 1) * size / new
    indices = np.arange(size)[:, None]
    overlap = np.minimum(indices + 1, edges[None, 1:]) - np.maximum(indices, edges[None, :-1])
    return normalized(np.maximum(overlap, 0.0))


def random_matrix(size: int, new: int, rng: np.random.Generator) -> Doubles:
    """[size, new]: positive random numbers, columns summing to one."""
    return normalized(rng.random((size, new)))


def normalized(matrix: Doubles) -> Doubles:
    """The matrix with its columns scaled to sum to one. Raises ValueError for a column that sums to zero."""
    sums = matrix.sum(axis=0)
    if not np.isfinite(matrix).all() or (np.abs(sums) < 1e-9).any():
        raise ValueError("columns must be finite and not sum to zero")
    scaled: Doubles = matrix / sums
    return scaled


def summing(matrix: Doubles) -> Doubles:
    """The matrix of the other side, [size, new]: rows scaled to sum to one; rows of zeros stay."""
    sums = matrix.sum(axis=1, keepdims=True)
    scaled: Doubles = matrix / np.where(np.abs(sums) < 1e-9, 1.0, sums)
    return scaled


def resample(
    weights: AttentionWeights, by: Resampling, *, corrected: bool = True, planes: Doubles | None = None
) -> AttentionWeights:
    """The module's formula.

    Args:
        corrected: False averages both sides, as the formula was first written down.
        planes: the selection [head_dim, d'] of dimensions of queries and keys, where positions are rotary.
    """
    other = summing if corrected else (lambda matrix: matrix)
    queries, keys = (planes, planes) if planes is not None else (by.head_dim, other(by.head_dim))

    def mixed(weight: Doubles, heads: Doubles, dimensions: Doubles) -> Doubles:
        found: Doubles = np.einsum("ihd,hg,de->ige", weight, heads, dimensions, optimize=True)
        return found

    return AttentionWeights(
        mixed(weights.query, by.heads, queries),
        mixed(weights.key, by.kv_heads, keys),
        mixed(weights.value, by.kv_heads, by.head_dim),
        np.einsum("hdo,hg,de->geo", weights.output, other(by.heads), other(by.head_dim), optimize=True),
        weights.offset,
    )


def matrices_for(plan: HeadPlan, matrix: str, seed: int) -> Resampling:
    """Matrices of the sizes of a plan; what is not made smaller is left as it is.

    Args:
        matrix: average, random, or a .npz file with `heads`, `head_dim` and, unless they are the same as heads,
            `kv_heads`; columns are scaled to sum to one.

    Raises UsageError where a file cannot be read or has matrices of other shapes.
    """
    rng = np.random.default_rng(seed)
    given = {} if matrix in ("average", "random") else _read_matrices(Path(matrix))
    matrices: dict[str, Doubles] = {}
    for name, size, new in zip(("heads", "kv_heads", "head_dim"), plan.before, plan.after, strict=True):
        if size == new and name not in given:
            matrices[name] = np.eye(size)
        elif name == "kv_heads" and plan.before[0] == plan.before[1] and plan.after[0] == plan.after[1]:
            matrices[name] = _given(given, name, (size, new), matrix) if name in given else matrices["heads"]
        elif given:
            matrices[name] = _given(given, name, (size, new), matrix)
        else:
            matrices[name] = random_matrix(size, new, rng) if matrix == "random" else average_matrix(size, new)
    return Resampling(**matrices)


def _read_matrices(path: Path) -> dict[str, Doubles]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name], np.float64) for name in file.files}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"reduce-heads: matrix={path} is none of average, random and cannot be read as a file: {error}",
            hint="give a .npz file with the arrays heads, head_dim and kv_heads",
        ) from error


def _given(matrices: Mapping[str, Doubles], name: str, shape: tuple[int, int], path: str) -> Doubles:
    given = matrices.get(name)
    if given is None or given.shape != shape:
        raise UsageError(
            f"{path}: {name} must be a matrix {list(shape)}, not {None if given is None else list(given.shape)}"
        )
    try:
        return normalized(given)
    except ValueError as error:
        raise UsageError(f"{path}: {name}: {error}") from error
