"""Ridge regression from moments: the same as from rows, and held-out tokens decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.fitting.ridge import Normal, fit, penalties, solve

SEEDS = st.integers(0, 2**31)


def normal(x: np.ndarray, target: np.ndarray) -> Normal:
    sums = Normal.empty(x.shape[1], target.shape[1])
    sums.add(x, target)
    return sums


@given(SEEDS, st.sampled_from([1e-4, 0.1, 10.0]), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_as_least_squares_over_rows(seed: int, ridge: float, loudness: float) -> None:
    """The penalty is one more row for each feature; rescaling a feature rescales its weight and nothing else."""
    rng = np.random.default_rng(seed)
    x, target, prior = (rng.standard_normal(shape) for shape in ((30, 5), (30, 3), (5, 3)))
    sums = normal(x, target)
    found = solve(sums.second, sums.cross, prior, penalties(sums.second, ridge))
    root = np.diag(np.sqrt(penalties(sums.second, ridge)))
    expected = np.linalg.lstsq(np.concatenate([x, root]), np.concatenate([target, root @ prior]), rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
    scales = np.array([loudness, 1, 1, 1, 1])
    louder = normal(x * scales, target)
    again = solve(louder.second, louder.cross, prior / scales[:, None], penalties(louder.second, ridge))
    # FLOOR, 1e-12 of the mean, does depend on how loud the others are.
    np.testing.assert_allclose(again * scales[:, None], found, rtol=1e-3, atol=1e-2 * np.abs(found).max())


@given(SEEDS)
@settings(deadline=None, max_examples=30)
def test_the_error_is_that_of_the_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, target, weight = (rng.standard_normal(shape) for shape in ((30, 5), (30, 3), (5, 3)))
    expected = np.square(x @ weight - target).sum()
    assert normal(x, target).error(weight) == pytest.approx(expected, rel=1e-10)
    assert (normal(x[:9], target[:9]) + normal(x[9:], target[9:])).error(weight) == pytest.approx(expected, rel=1e-10)


def test_a_weight_that_can_be_reached_is_found() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((400, 6)), rng.standard_normal((6, 4))
    before = weight + rng.standard_normal(weight.shape) / 4
    priors = {"current": before, "zero": np.zeros_like(weight)}
    found = fit(normal(x[:300], x[:300] @ weight), normal(x[300:], x[300:] @ weight), before, priors, (1e-6, 0.1))
    assert (found.prior, found.ridge) == ("current", 1e-6)
    assert found.after < 1e-8 * found.before
    np.testing.assert_allclose(found.weight, weight, atol=1e-5)


def test_what_only_fits_noise_is_not_taken() -> None:
    """Fewer tokens than features, and a target that the weight that is there is right about, but for noise."""
    rng = np.random.default_rng(1)
    x, weight = rng.standard_normal((500, 40)), rng.standard_normal((40, 4))
    target = x @ weight + rng.standard_normal((500, 4))
    train, held_out = normal(x[:45], target[:45]), normal(x[45:], target[45:])
    found = fit(train, held_out, weight, {"current": weight, "zero": np.zeros_like(weight)}, (1e-4,))
    assert found.prior is None
    assert found.after == found.before
    assert found.weight is weight


def test_more_noise_asks_for_more_ridge() -> None:
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((400, 20)), rng.standard_normal((20, 4))
    before = weight + 0.3 * rng.standard_normal(weight.shape)
    chosen = []
    for noise in (0.01, 3.0):
        target = x @ weight + noise * rng.standard_normal((400, 4))
        found = fit(
            normal(x[:60], target[:60]), normal(x[60:], target[60:]), before, {"current": before}, (1e-4, 0.1, 10)
        )
        chosen.append(found.ridge)
    assert chosen == [1e-4, 10]


def test_features_that_are_always_zero_keep_their_prior() -> None:
    x = np.array([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    sums = normal(x, x[:, :1] * 3)
    np.testing.assert_allclose(
        solve(sums.second, sums.cross, np.array([[0.0], [7.0]]), penalties(sums.second, 1e-9)), [[3], [7]], rtol=1e-5
    )
