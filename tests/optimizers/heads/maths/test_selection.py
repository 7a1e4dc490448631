"""Choosing heads: against the brute-force least squares, exact where heads are equal or silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxpress.optimizers.fitting.ridge import penalties
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.selection import Elimination, eliminate_heads, loudest_heads, output_norms

Function = Callable[..., Any]


def penalty_of(z: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    return penalties(z.T @ z / len(z), ridge)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 3), out=st.integers(1, 5))
def test_elimination_is_least_squares_without_the_rows(seed: int, size: int, out: int) -> None:
    """Costs and weights against numpy's own solver, with three blocks going one after the other."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((60, 5 * size)) @ rng.standard_normal((5 * size, 5 * size))
    output = rng.standard_normal((5 * size, out))
    elimination = Elimination(z.T @ z / len(z), output, penalty_of(z, 0.0))
    left, lost = set(range(5)), 0.0
    for block in (3, 0, 4):
        rows = np.arange(block * size, (block + 1) * size)
        lost += elimination.cost(rows)
        elimination.remove(rows)
        left.remove(block)
        kept = [row for row in range(5 * size) if row // size in left]
        expected, *_ = np.linalg.lstsq(z[:, kept], z @ output, rcond=None)
        error = np.square(z[:, kept] @ expected - z @ output).sum() / len(z)
        np.testing.assert_allclose(z[:, kept] @ elimination.output[kept], z[:, kept] @ expected, atol=1e-5)
        assert lost == pytest.approx(error, rel=1e-4, abs=1e-7)
        assert not elimination.output[rows].any()


def test_heads_that_do_nothing_go_first_and_nothing_changes(
    rng: np.random.Generator, random_weights: Function, states: Function, attend: Function
) -> None:
    weights = random_weights(rng, 12, 6, 2, 4)
    weights.output[[1, 5]] = 0
    x = rng.standard_normal((40, 12))
    z = states(weights, x, 0.5)
    for method in ("least-squares", "slice"):
        if method == "slice":
            kept, output = loudest_heads(output_norms(z.T @ z, weights.output), 2, (4, 2)), weights.output
            output = output[kept]
        else:
            kept, output = eliminate_heads(z.T @ z / 40, weights.output, 2, (4, 2), penalty_of(z, 0.01))
        assert kept.tolist() == [0, 2, 3, 4]
        reduced = weights.keep(kept)
        found = AttentionWeights(reduced.query, reduced.key, reduced.value, output, reduced.offset)
        np.testing.assert_allclose(attend(found, x), attend(weights, x), atol=1e-9)


def test_equal_heads_merge_exactly(
    rng: np.random.Generator, random_weights: Function, states: Function, attend: Function
) -> None:
    """The second half of the heads repeats the first; without a ridge the refit finds the sums of their outputs."""
    half = random_weights(rng, 10, 3, 3, 4)
    twice = AttentionWeights(
        *(np.concatenate([one, one], axis=1) for one in (half.query, half.key, half.value)),
        np.concatenate([half.output, rng.standard_normal(half.output.shape)]),
        half.offset,
    )
    x = rng.standard_normal((80, 10))
    z = states(twice, x, 0.5)
    kept, output = eliminate_heads(z.T @ z / 80, twice.output, 6, (3, 3), penalty_of(z, 1e-9))
    assert sorted(kept % 3) == [0, 1, 2]
    reduced = twice.keep(kept)
    found = AttentionWeights(reduced.query, reduced.key, reduced.value, output, reduced.offset)
    np.testing.assert_allclose(attend(found, x), attend(twice, x), atol=1e-5)


def test_groups_stay_equal_and_go_whole(rng: np.random.Generator) -> None:
    z = rng.standard_normal((100, 12 * 2)) * np.repeat(rng.permutation(12) + 1, 2)
    output = rng.standard_normal((12, 2, 7))
    kept, _ = eliminate_heads(z.T @ z / 100, output, 4, (4, 2), penalty_of(z, 0.01))
    groups, counts = np.unique(kept // 3, return_counts=True)
    assert len(groups) == 2
    assert counts.tolist() == [2, 2]
    assert loudest_heads([5, 1, 3, 9, 2, 8], 2, (4, 2)).tolist() == [0, 2, 3, 5]
    assert loudest_heads([5, 1, 3, 9, 2, 8], 2, (2, 1)).tolist() == [3, 5]


def test_keeping_uneven_heads_is_refused(rng: np.random.Generator, random_weights: Function) -> None:
    with pytest.raises(ValueError, match="unequal"):
        random_weights(rng, 4, 4, 2, 2).keep(np.array([0, 1, 2]))
