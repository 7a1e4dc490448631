"""Values regressed on all heads' work: exact where the heads that stay attend as all did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxpress.optimizers.fitting.ridge import Normal
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.output_refit import OutputSums
from onnxpress.optimizers.heads.maths.value_regression import HeadProducts, cluster_sums, regress_values, successors

Function = Callable[..., Any]


def sums_of(x: np.ndarray, y: np.ndarray) -> OutputSums:
    normal = Normal.empty(x.shape[1] + 1, y.shape[1])
    normal.add(np.column_stack([x, np.ones(len(x))]), y)
    return OutputSums.of(normal, centred=False)


def test_a_head_takes_over_from_those_that_attend_like_it(rng: np.random.Generator, random_weights: Function) -> None:
    """Heads 0 and 2 attend alike, as do 1 and 3; two heads of twice the rank do the work of four."""
    weights = random_weights(rng, 7, 4, 4, 3, bias=False)
    maps = rng.standard_normal((2, 50, 7))
    attended = maps[[0, 1, 0, 1]]
    target = sum(attended[head] @ weights.value[:-1, head] @ weights.output[head] for head in range(4))
    products = HeadProducts(4)
    for rows in (slice(0, 20), slice(20, 50)):
        products.update(attended[:, rows].transpose(1, 0, 2).reshape(-1, 28).astype(np.float32), 0)
    kept = np.array([1, 2])
    nearest = successors(products.total, kept)
    assert nearest.tolist() == [1, 0, 1, 0]
    prior = cluster_sums(weights, kept, nearest)
    side_by_side = attended[kept].transpose(1, 0, 2).reshape(50, -1)
    np.testing.assert_allclose(side_by_side @ prior.reshape(14, -1), target, atol=1e-10)
    value, output = regress_values(sums_of(side_by_side, target), prior, 2, 6, 0.1)
    found = sum(attended[head] @ value[:, one] @ output[one] for one, head in enumerate(kept))
    np.testing.assert_allclose(found, target, atol=1e-6)


def test_regression_beats_the_sums_and_keeps_to_the_rank(rng: np.random.Generator, random_weights: Function) -> None:
    weights = random_weights(rng, 6, 3, 3, 2, bias=False)
    attended = rng.standard_normal((3, 200, 6))
    attended[2] = 0.6 * attended[0] + 0.6 * attended[1]
    target = sum(attended[head] @ weights.value[:-1, head] @ weights.output[head] for head in range(3))
    side = attended[:2].transpose(1, 0, 2).reshape(200, -1)
    prior = cluster_sums(weights, np.array([0, 1]), np.array([0, 1, 0]))
    value, output = regress_values(sums_of(side, target), prior, 2, 2, 0.1)
    assert value.shape == (6, 2, 2)
    assert output.shape == (2, 2, 6)
    found = sum(attended[head] @ value[:, head] @ output[head] for head in range(2))
    dropped = sum(attended[head] @ weights.value[:-1, head] @ weights.output[head] for head in range(2))
    summed = side @ prior.reshape(12, -1)
    errors = [float(np.square(one - target).sum()) for one in (found, summed, dropped)]
    assert errors[0] < min(errors[1:])
    assert isinstance(weights, AttentionWeights)


def test_heads_of_a_group_get_one_value(rng: np.random.Generator, random_weights: Function) -> None:
    """Six heads over two values, those of a group attending apart; two of each group stay, and the third attends as one
    of these: the value as it was has the rank to do the work of all, and no smaller one has."""
    weights = random_weights(rng, 7, 6, 2, 3, bias=False)
    maps = rng.standard_normal((4, 60, 7))
    attended = maps[[0, 1, 0, 2, 3, 2]]
    target = sum(attended[head] @ weights.value[:-1, head // 3] @ weights.output[head] for head in range(6))
    kept = np.array([0, 1, 4, 5])
    prior = cluster_sums(weights, kept, np.array([0, 1, 0, 3, 2, 3]))
    side = attended[kept].transpose(1, 0, 2).reshape(60, -1)
    np.testing.assert_allclose(side @ prior.reshape(28, -1), target, atol=1e-10)
    for size, exact in ((3, True), (2, False)):
        value, output = regress_values(sums_of(side, target), prior, 2, size, 0.1)
        assert value.shape == (7, 2, size)
        found = sum(attended[head] @ value[:, one // 2] @ output[one] for one, head in enumerate(kept))
        assert bool(np.abs(found - target).max() < 1e-6) is exact
