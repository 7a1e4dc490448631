"""Moments and sums where a share of tokens stands alone, against attention over texts of one token each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxpress.arrays import Doubles
from onnxpress.optimizers.fitting.ridge import Normal
from onnxpress.optimizers.heads.maths.attention_sinks import mixed_moments, mixed_sums
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights

Function = Callable[..., Any]


def with_one(x: Doubles) -> Doubles:
    return np.column_stack([x, np.ones(len(x))])


@pytest.fixture
def alone(states: Function) -> Callable[[AttentionWeights, Doubles], Doubles]:
    """z of tokens that are texts of their own."""
    return lambda weights, x: np.concatenate([states(weights, token[None], 0.5) for token in x])


def test_moments(rng: np.random.Generator, random_weights: Function, states: Function, alone: Function) -> None:
    weights = random_weights(rng, 8, 6, 2, 3)
    x = rng.standard_normal((30, 8))
    hidden = with_one(x).T @ with_one(x) / 30
    text, single = with_one(states(weights, x, 0.5)), with_one(alone(weights, x))
    found = mixed_moments(text.T @ text / 30, weights, hidden, 0.2)
    np.testing.assert_allclose(found, (0.8 * text.T @ text + 0.2 * single.T @ single) / 30, atol=1e-12)
    assert np.abs(found - text.T @ text / 30).max() > 0.01


def test_sums(
    rng: np.random.Generator, random_weights: Function, states: Function, alone: Function, attend: Function
) -> None:
    """Of other values than those whose outputs are wanted; tokens have weights, as those of a stream."""
    original, weights = random_weights(rng, 8, 6, 2, 3), random_weights(rng, 8, 4, 2, 3)
    x, root = rng.standard_normal((30, 8)), rng.uniform(0.5, 2, (30, 1))
    hidden = with_one(x).T @ with_one(x) / 30
    seen, expected = Normal.empty(13, 8), Normal.empty(13, 8)
    for sums in (seen, expected):
        sums.add(with_one(states(weights, x, 0.5)) * root, attend(original, x) * root)
    z = with_one(alone(weights, x))
    wanted = np.concatenate([attend(original, token[None]) for token in x])
    part = np.sqrt(np.square(root).sum() * 0.2 / 0.8 / 30)  # a fifth of all weight
    expected.add(z * part, wanted * part)
    found = mixed_sums(seen, weights, original, hidden, 0.2)
    np.testing.assert_allclose(found.second, expected.second, atol=1e-9)
    np.testing.assert_allclose(found.cross, expected.cross, atol=1e-9)
    assert found.square == pytest.approx(expected.square)
    assert found.second[-1, -1] * 0.2 == pytest.approx(np.square(part) * 30)
