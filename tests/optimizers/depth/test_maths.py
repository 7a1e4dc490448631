"""The maths of fewer layers, against what it must be exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.depth.maths import (
    CrossValidatedRegression,
    angular_distance,
    before_norm,
    combine,
    cosines,
    divergence,
    influence,
    lowest,
    merge_coefficients,
    runs,
)

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(2, 40), st.floats(0.01, 1000))
def test_scores_see_directions_only(seed: int, rows: int, features: int, size: float) -> None:
    """A layer that only scales has no influence; one that turns round has the most; a right angle is half of that."""
    x = np.random.default_rng(seed).standard_normal((rows, features))
    np.testing.assert_allclose(influence(x, size * x), 0, atol=1e-12)
    np.testing.assert_allclose(influence(x, -size * x), 2, atol=1e-12)
    # arccos turns rounding of 2^-53 near 1 into about 2^-26 of angle.
    np.testing.assert_allclose(angular_distance(x, size * x), 0, atol=1e-7)
    np.testing.assert_allclose(angular_distance(x, -x), 1, atol=1e-7)
    turned = np.stack([-x[:, 1], x[:, 0]], axis=1)
    np.testing.assert_allclose(angular_distance(x[:, :2], turned), 0.5, atol=1e-7)


def test_states_that_are_zero() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert cosines(zero, zero) == 1
    assert cosines(zero, one) == 0


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 30), st.floats(-50, 50))
def test_divergence(seed: int, words: int, shift: float) -> None:
    """Zero for equal distributions, however logits are shifted, else Σ p log(p / q)."""
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((2, 3, words)) * 3
    np.testing.assert_allclose(divergence(one, one + shift), 0, atol=1e-12)
    p, q = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (one, other))
    np.testing.assert_allclose(divergence(one, other), (p * np.log(p / q)).sum(-1), rtol=1e-9, atol=1e-12)
    assert (divergence(one, other) >= -1e-12).all()


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.data())
def test_lowest(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores)))
    found = lowest(scores, count)
    assert found == sorted(set(found))
    assert sorted(scores[index] for index in found) == sorted(scores)[:count]


def test_of_equal_scores_the_later_goes() -> None:
    assert lowest([1.0, 0.0, 0.0, 0.0], 2) == [2, 3]


@settings(deadline=None)
@given(st.sets(st.integers(0, 30)))
def test_runs(indices: set[int]) -> None:
    found = runs(sorted(indices))
    assert [index for run in found for index in run] == sorted(indices)
    assert all(run == list(range(run[0], run[-1] + 1)) for run in found)
    assert all(one[-1] + 1 < other[0] for one, other in itertools.pairwise(found))


@pytest.mark.parametrize("method", ["merge", "average"])
@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_equal_layers_merge_to_themselves(method: str, seed: int, removed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 5)).astype(np.float32) * 100
    coefficients = merge_coefficients(method, removed)  # type: ignore[arg-type]
    assert sum(coefficients) == pytest.approx(1, abs=1e-15)
    # A sum of coefficients that is 1 to 2^-53 leaves float32 as it is.
    np.testing.assert_array_equal(combine([weight] * (removed + 1), coefficients), weight)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 4))
def test_merging_adds_what_each_layer_adds(seed: int, removed: int) -> None:
    """W + Σ (W_k − W), and the mean."""
    weights = np.random.default_rng(seed).standard_normal((removed + 1, 3, 4)).astype(np.float32)
    merged = combine(list(weights), merge_coefficients("merge", removed))
    exact = weights.astype(np.float64)
    np.testing.assert_allclose(merged, exact[0] + (exact[1:] - exact[0]).sum(0), atol=1e-6)
    np.testing.assert_allclose(combine(list(weights), merge_coefficients("average", removed)), exact.mean(0), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 8), st.integers(1, 6), st.integers(1, 4))
def test_a_linear_map_is_found_exactly(seed: int, inputs: int, outputs: int, parts: int) -> None:
    """Whatever the weights of tokens, where there are more tokens than inputs in each half."""
    rng = np.random.default_rng(seed)
    x, matrix = rng.standard_normal((128, inputs)), rng.standard_normal((inputs, outputs))
    weights = rng.uniform(0.1, 10, 128)
    regression = CrossValidatedRegression()
    for rows in np.array_split(np.arange(128), parts):
        regression.update(x[rows], x[rows] @ matrix, weights[rows])
    patch = regression.solve((1e-12,))
    np.testing.assert_allclose(patch.matrix, matrix, atol=1e-8)
    assert patch.error < 1e-12


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_weighted_least_squares(seed: int) -> None:
    """Against rows multiplied by the roots of their weights and numpy's least squares with the ridge as more rows."""
    rng = np.random.default_rng(seed)
    x, y, weights = rng.standard_normal((200, 5)), rng.standard_normal((200, 2)), rng.uniform(0.1, 3, 200)
    y += x @ rng.standard_normal((5, 2))
    regression = CrossValidatedRegression()
    regression.update(x, y, weights)
    patch = regression.solve((0.1,))
    roots = np.sqrt(weights)[:, None]
    strength = np.sqrt(0.1 * np.mean(np.square(x * roots).sum(0)))
    rows = np.concatenate([x * roots, strength * np.eye(5)]), np.concatenate([y * roots, np.zeros((5, 2))])
    np.testing.assert_allclose(patch.matrix, np.linalg.lstsq(*rows, rcond=None)[0], atol=1e-9)


def test_noise_gets_no_map() -> None:
    """Fewer tokens than inputs, and nothing to find: what one half says does not hold in the other."""
    rng = np.random.default_rng(0)
    regression = CrossValidatedRegression()
    regression.update(rng.standard_normal((64, 60)), rng.standard_normal((64, 8)), np.ones(64))
    patch = regression.solve((1e-7, 1e-3))
    assert patch.error == 1
    assert not patch.matrix.any()


def test_the_ridge_is_chosen_by_what_was_not_fitted() -> None:
    """Few noisy tokens need more of it than many clean ones."""
    rng = np.random.default_rng(0)
    found = []
    for tokens, noise in ((4096, 0.0), (96, 3.0)):
        regression = CrossValidatedRegression()
        x = rng.standard_normal((tokens, 40))
        y = x @ rng.standard_normal((40, 10)) + noise * rng.standard_normal((tokens, 10))
        regression.update(x, y, np.ones(tokens))
        found.append(regression.solve().ridge)
    assert found[0] < found[1]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(3, 20))
def test_a_norm_makes_what_was_wanted_of_what_it_should_read(seed: int, features: int) -> None:
    rng = np.random.default_rng(seed)
    gain, bias = rng.uniform(0.5, 2, features), rng.standard_normal(features)

    def norm(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * gain + bias

    wanted, sums = norm(rng.standard_normal((6, features))), 5 * rng.standard_normal((6, features)) + 1
    found = before_norm(wanted, sums, gain, bias)
    np.testing.assert_allclose(norm(found), wanted, atol=1e-7)
    np.testing.assert_allclose(found.std(-1), sums.std(-1), rtol=1e-6)
    np.testing.assert_allclose(found.mean(-1), sums.mean(-1), atol=1e-6)
