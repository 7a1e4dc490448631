"""Directions of the residual stream, norms over fewer components, and heads that stay tied."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.optimizers.pruning.maths.hidden import (
    center,
    lost_share,
    principal_directions,
    stream_scale,
    tied_mixture,
)

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(2, 12), st.data())
def test_a_stream_in_a_subspace_is_kept_whole_and_its_norm_with_it(seed: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    kept = data.draw(st.integers(1, width))
    basis = np.linalg.qr(rng.standard_normal((width, kept)))[0]
    x = rng.standard_normal((50, kept)) @ basis.T
    covariance = x.T @ x / len(x)
    q = principal_directions(covariance, kept)
    np.testing.assert_allclose(q.T @ q, np.eye(kept), atol=1e-12)
    assert lost_share(covariance, q) < 1e-12
    np.testing.assert_allclose(x @ q @ q.T, x, atol=1e-10 * width * np.abs(x).max())
    scale = stream_scale(width, kept)
    z = scale * x @ q
    normed = z / np.sqrt(np.square(z).mean(1, keepdims=True) + 1e-2) / scale
    expected = x / np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(normed @ q.T, expected, atol=1e-9)


@given(SEEDS, st.integers(2, 12), st.data())
def test_no_other_directions_lose_less(seed: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    kept = data.draw(st.integers(1, width))
    x = rng.standard_normal((50, width)) * rng.uniform(0.1, 3, width)
    covariance = x.T @ x / 50
    best = lost_share(covariance, principal_directions(covariance, kept))
    other = np.linalg.qr(rng.standard_normal((width, kept)))[0]
    assert best <= lost_share(covariance, other) + 1e-12
    residual = x - x @ other @ other.T
    np.testing.assert_allclose(lost_share(covariance, other), np.square(residual).sum() / np.square(x).sum(), atol=1e-9)


@given(SEEDS, st.integers(2, 10))
def test_layer_norm_is_an_rms_norm_of_what_was_centered(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((5, 7)), rng.standard_normal((7, width))
    raw, y = x @ weight, x @ center(weight)
    expected = (raw - raw.mean(1, keepdims=True)) / np.sqrt(raw.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y / np.sqrt(np.square(y).mean(1, keepdims=True) + 1e-5), expected, atol=1e-9)


@given(SEEDS, st.integers(2, 10))
def test_a_tied_head_loses_nothing_where_nothing_is_deleted(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    table, gain = rng.standard_normal((40, width)), rng.uniform(0.2, 3, width)
    q = np.linalg.qr(rng.standard_normal((width, width)))[0]
    mixture = tied_mixture(table.T @ table, gain, q)
    np.testing.assert_allclose(mixture, q.T @ np.diag(gain) @ q, atol=1e-6)


@given(SEEDS, st.integers(3, 10), st.data())
def test_a_tied_head_is_the_least_squares_one(seed: int, width: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    kept = data.draw(st.integers(1, width - 1))
    table, gain = rng.standard_normal((40, width)), rng.uniform(0.2, 3, width)
    q = np.linalg.qr(rng.standard_normal((width, kept)))[0]
    expected = np.linalg.lstsq(table @ q, table @ np.diag(gain) @ q, rcond=None)[0].T
    np.testing.assert_allclose(tied_mixture(table.T @ table, gain, q), expected, atol=1e-6)
