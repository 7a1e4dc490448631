"""Choosing channels and making up for them: what is exact is exact, and the greedy order is that of brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.fitting.ridge import penalties
from onnxpress.optimizers.pruning.maths import width

SIZES = st.tuples(st.integers(2, 9), st.integers(1, 5), st.integers(0, 2**31))


def problem(channels: int, outputs: int, seed: int, tokens: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Activations [tokens, channels] of very different sizes, and the weight of down."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((tokens, channels)) @ rng.standard_normal((channels, channels))
    return z * np.exp(rng.normal(0, 2, channels)), rng.standard_normal((channels, outputs))


def second(z: np.ndarray) -> np.ndarray:
    return z.T @ z / len(z)


def penalized_loss(z: np.ndarray, weight: np.ndarray, kept: np.ndarray, after: np.ndarray, ridge: float) -> float:
    """What `refit` minimises, computed token by token; a removed channel has the weight 0."""
    full = np.zeros_like(weight)
    full[kept] = after
    error = np.square(z @ full - z @ weight).sum() / len(z)
    return float(error + np.sum(penalties(second(z), ridge)[:, None] * np.square(full - weight)))


@given(SIZES)
@settings(deadline=None, max_examples=40)
def test_elimination_removes_what_the_others_make_up_for_best(sizes: tuple[int, int, int]) -> None:
    """The first removal is brute force's best, and costs are those of the ridge regressions that they stand for."""
    channels, outputs, seed = sizes
    z, weight = problem(channels, outputs, seed)
    ridge = 0.01
    found = width.eliminate(second(z), weight, channels - 1, penalties(second(z), ridge))
    assert len(set(found.order)) == channels - 1

    def best(kept: np.ndarray) -> float:
        # Least squares with the penalty as more rows: an oracle that knows no moments.
        root = np.sqrt(penalties(second(z), ridge))
        rows = np.concatenate([z / np.sqrt(len(z)), np.diag(root)])
        after = np.linalg.lstsq(rows[:, kept], rows @ weight, rcond=None)[0]
        return penalized_loss(z, weight, kept, after, ridge)

    singles = [best(np.delete(np.arange(channels), j)) for j in range(channels)]
    assert found.costs[0] == pytest.approx(min(singles), rel=1e-6)
    for count in range(1, channels):
        kept = np.setdiff1d(np.arange(channels), found.order[:count])
        assert found.costs[count - 1] == pytest.approx(best(kept), rel=1e-5), count


@pytest.mark.parametrize("block", [1, 3, 64])
def test_the_order_does_not_depend_on_how_often_the_inverse_is_updated(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    z, weight = problem(90, 7, 5, tokens=400)
    expected = width.eliminate(second(z), weight, 80, penalties(second(z), 0.01))
    monkeypatch.setattr(width, "BLOCK", block)
    found = width.eliminate(second(z), weight, 80, penalties(second(z), 0.01))
    assert found.order.tolist() == expected.order.tolist()
    np.testing.assert_allclose(found.costs, expected.costs, rtol=1e-6)


@given(SIZES, st.sampled_from(["dead", "unread"]))
@settings(deadline=None, max_examples=30)
def test_zero_channels_go_first_and_nothing_changes(sizes: tuple[int, int, int], kind: str) -> None:
    channels, outputs, seed = sizes
    z, weight = problem(channels, outputs, seed)
    (z if kind == "dead" else weight.T)[:, 1] = 0
    mean = z.mean(axis=0)
    orders = [
        width.eliminate(second(z), weight, 1, penalties(second(z), 0.01)).order,
        width.rank(width.importance_by_activation(second(z), weight), 1).order,
        width.rank(width.importance_by_fluctuation(second(z), mean, weight), 1).order,
    ]
    assert [order.tolist() for order in orders] == [[1]] * 3
    kept = np.delete(np.arange(channels), 1)
    after = width.refit(second(z), weight, kept, penalties(second(z), 0.01))
    # float64's solve, times the condition of the moments, which the ridge keeps below channels / 0.01
    np.testing.assert_allclose(after, weight[kept], rtol=1e-9, atol=1e-9 * np.abs(weight).max())
    assert width.error(second(z), weight, kept, after) < 1e-15


@given(SIZES, st.floats(-3, 3))
@settings(deadline=None, max_examples=30)
def test_copies_are_merged(sizes: tuple[int, int, int], factor: float) -> None:
    """The last channel is a multiple of the first: one of them goes, and the other takes over its weight."""
    channels, outputs, seed = sizes
    z, weight = problem(channels, outputs, seed)
    z[:, -1] = factor * z[:, 0]
    ridge = 1e-9
    removal = width.eliminate(second(z), weight, 1, penalties(second(z), ridge))
    kept = np.delete(np.arange(channels), removal.order[0])
    after = width.refit(second(z), weight, kept, penalties(second(z), ridge))
    total = np.square(z @ weight).sum()
    assert np.square(z[:, kept] @ after - z @ weight).sum() <= 1e-5 * total + 1e-30
    merged = np.arange(channels - 1)
    after = width.refit(second(z), weight, merged, penalties(second(z), ridge))
    expected = weight[:-1].copy()
    expected[0] += factor * weight[-1]
    np.testing.assert_allclose(z[:, :-1] @ after, z[:, :-1] @ expected, atol=3e-3 * np.abs(z @ weight).max() + 1e-9)


@given(SIZES, st.sampled_from([0.0, 0.01, 10.0]))
@settings(deadline=None, max_examples=30)
def test_keeping_all_changes_nothing(sizes: tuple[int, int, int], ridge: float) -> None:
    channels, outputs, seed = sizes
    z, weight = problem(channels, outputs, seed)
    after = width.refit(second(z), weight, np.arange(channels), penalties(second(z), ridge))
    np.testing.assert_allclose(z @ after, z @ weight, rtol=1e-6, atol=1e-6 * np.abs(z @ weight).max())
    assert np.abs(width.compensation(z.mean(axis=0), weight, np.arange(channels), weight)).max() < 1e-9 * (
        1 + np.abs(z @ weight).max()
    )


def test_a_constant_channel_goes_into_the_bias() -> None:
    """FLAP's case: nothing fluctuates, so that the mean is all that there is to keep."""
    z, weight = problem(6, 3, 1)
    z[:, 2] = 50.0
    mean = z.mean(axis=0)
    assert width.rank(width.importance_by_fluctuation(second(z), mean, weight), 1).order.tolist() == [2]
    kept = np.array([0, 1, 3, 4, 5])
    bias = width.compensation(mean, weight, kept, weight[kept])
    np.testing.assert_allclose(z[:, kept] @ weight[kept] + bias, z @ weight, atol=1e-9)


def test_magnitude_and_gradients() -> None:
    rng = np.random.default_rng(2)
    down, gate, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (4, 5), (4, 5)))
    for order in (1, 2):
        found = width.importance_by_magnitude(order, down, [gate, up])
        expected = [
            np.prod([np.linalg.norm(part, ord=order) for part in (down[j], gate[:, j], up[:, j])]) for j in range(5)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    # Of f = Σ (down ⊙ a) + Σ (up ⊙ b), whose gradients are a and b, what is lost to first order when channel j goes
    a, b = rng.standard_normal((5, 3)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)
    expected = [abs((down[j] * a[j]).sum() + (up[:, j] * b[:, j]).sum()) for j in range(5)]
    np.testing.assert_allclose(width.importance_by_gradient((down, a), [(up, b)]), expected, rtol=1e-5)
