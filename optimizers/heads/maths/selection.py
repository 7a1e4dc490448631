"""Which heads to keep: backward elimination by what the attention's output loses, or the loudest ones.

The output of an attention is z · O, z being what all heads computed, side by side. Dropping heads drops blocks of rows
of O; the best that the other rows can then do is a least-squares fit that needs no more than E[z zᵀ]. Eliminating one
block at a time with the inverse of that matrix at hand is the optimal brain surgeon's step (Hassibi and Stork 1993) for
blocks: block b costs tr(O_bᵀ (H⁻¹_bb)⁻¹ O_b), and the others become O − H⁻¹_:b (H⁻¹_bb)⁻¹ O_b.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxpress.arrays import Doubles, Indices


class Elimination:
    """Blocks of rows of O leave one after the other, the others refitted each time."""

    def __init__(self, gram: Doubles, output: Doubles, penalty: Doubles) -> None:
        """
        Args:
            gram: E[z zᵀ] or the covariance, [rows, rows].
            output: O, [rows, out].
            penalty: how strongly rows of O are held where they were, [rows], see `ridge.penalties`; above zero.
        """
        penalized = gram + np.diag(penalty)
        scale = np.sqrt(np.diagonal(penalized))
        # In units in which all rows are equally loud: the costs stay the same and the inverse is well conditioned.
        self.inverse = np.linalg.inv(penalized / scale / scale[:, None])
        self._scale = scale[:, None]
        self._rows = output * self._scale

    @property
    def output(self) -> Doubles:
        """O as it is by now, [rows, out]; zeros for those that went."""
        found: Doubles = self._rows / self._scale
        return found

    def cost(self, rows: Indices) -> float:
        """By how much the squared error grows when these rows go."""
        block = self._rows[rows]
        return float(np.sum(block * np.linalg.solve(self.inverse[np.ix_(rows, rows)], block)))

    def remove(self, rows: Indices) -> None:
        gain = np.linalg.solve(self.inverse[np.ix_(rows, rows)], self.inverse[rows]).T
        self._rows -= gain @ self._rows[rows]
        self.inverse -= gain @ self.inverse[rows]
        self._rows[rows] = 0.0
        self.inverse[rows] = self.inverse[:, rows] = 0.0
        self.inverse[rows, rows] = 1.0  # never looked at again, but stays regular


def eliminate_heads(
    gram: Doubles, output: Doubles, kv_heads: int, keep: tuple[int, int], penalty: Doubles
) -> tuple[Indices, Doubles]:
    """Whole groups of query heads that share keys and values first, then heads evenly within the groups that stay.

    Args:
        gram: E[z zᵀ] or the covariance, [heads · head_dim] squared.
        output: O, [heads, head_dim, out].
        kv_heads: how many groups the heads form.
        keep: (heads, groups) to keep; heads is a multiple of groups.
        penalty: see `Elimination`.

    Returns:
        The heads kept, ascending, and O refitted for them, [kept, head_dim, out].
    """
    heads, head_dim, out = output.shape
    rows = np.arange(heads * head_dim).reshape(heads, head_dim)
    group = heads // kv_heads
    elimination = Elimination(gram, output.reshape(-1, out), penalty)
    groups = list(range(kv_heads))
    while len(groups) > keep[1]:
        blocks = {kv_head: rows[kv_head * group : (kv_head + 1) * group].reshape(-1) for kv_head in groups}
        cheapest = min(groups, key=lambda kv_head: elimination.cost(blocks[kv_head]))
        elimination.remove(blocks[cheapest])
        groups.remove(cheapest)
    members = {kv_head: list(range(kv_head * group, (kv_head + 1) * group)) for kv_head in groups}
    quota = keep[0] // keep[1]
    while candidates := [head for heads in members.values() if len(heads) > quota for head in heads]:
        cheapest = min(candidates, key=lambda head: elimination.cost(rows[head]))
        elimination.remove(rows[cheapest])
        members[cheapest // group].remove(cheapest)
    kept = np.array([head for heads in members.values() for head in heads], np.int64)
    return kept, elimination.output.reshape(heads, head_dim, out)[kept]


def loudest_heads(norms: Sequence[float] | Doubles, kv_heads: int, keep: tuple[int, int]) -> Indices:
    """The heads with the largest norms: the groups with the largest sums, and evenly many within each; ascending."""
    by_group = np.asarray(norms, np.float64).reshape(kv_heads, -1)
    groups = np.sort(np.argsort(-by_group.sum(axis=1), kind="stable")[: keep[1]])
    quota = keep[0] // keep[1]
    inside = np.sort(np.argsort(-by_group[groups], axis=1, kind="stable")[:, :quota], axis=1)
    kept: Indices = (groups[:, None] * by_group.shape[1] + inside).reshape(-1)
    return kept


def output_norms(gram: Doubles, output: Doubles) -> Doubles:
    """E|z_h O_h|² of each head, [heads], from E[z zᵀ] and O [heads, head_dim, out]."""
    norms: Doubles = np.einsum("hde,hdo,heo->h", head_blocks(gram, len(output)), output, output)
    return norms


def head_blocks(gram: Doubles, heads: int) -> Doubles:
    """The diagonal blocks of a Gram matrix, [heads, head_dim, head_dim]."""
    size = len(gram) // heads
    blocks: Doubles = np.einsum("hdhe->hde", gram.reshape(heads, size, heads, size))
    return blocks
