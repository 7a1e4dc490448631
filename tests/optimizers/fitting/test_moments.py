"""Weighted moments and targets: what streams by is what is summed."""

from __future__ import annotations

import numpy as np
import pytest

from onnxpress.errors import BadInputError, UnsupportedModelError
from onnxpress.optimizers.fitting.moments import Moments, StreamLengths
from onnxpress.optimizers.fitting.targets import HELD_OUT, Minus, Plus, Regression, Target


def rows(seed: int, tokens: int, features: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, features)).astype(np.float32)


def test_tokens_weigh_by_their_stream() -> None:
    """A token a thousand times louder, in and out, counts as much as any other."""
    x, stream = rows(0, 2500, 5), rows(1, 2500, 3)
    loud = np.ones((2500, 1), np.float32)
    loud[7] = 1000
    lengths = StreamLengths()
    lengths.update(stream[:, :1] * loud, 4)
    lengths.update(stream[:, 1:] * loud, 4)  # a stream in two parts
    moments = Moments(5, "x", lengths)
    moments.update(x * loud, 4)
    weights = 1 / np.square(stream * loud, dtype=np.float64).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        moments.second(), (x * loud).T @ (x * loud * weights) / weights.sum(), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(moments.mean(), (x * loud * weights).sum(axis=0) / weights.sum(), rtol=1e-3, atol=1e-5)
    assert moments.scale() == pytest.approx(weights.mean(), rel=1e-5)


def test_without_a_stream_tokens_are_equal() -> None:
    x = rows(0, 100, 5)
    moments = Moments(5, "x")
    moments.update(x[:30], 0)
    moments.update(x[30:], 1)
    np.testing.assert_allclose(moments.second(), x.T @ x / 100, rtol=1e-5, atol=1e-6)
    assert moments.scale() == 1


def test_what_cannot_be_summed() -> None:
    with pytest.raises(BadInputError, match="No sample reached x"):
        Moments(5, "x").second()
    x = rows(0, 3, 5)
    x[1, 2] = np.inf
    with pytest.raises(BadInputError, match="x is not finite"):
        Moments(5, "x").update(x, 0)
    with pytest.raises(UnsupportedModelError, match="3 tokens are to be weighted; the residual stream has 0"):
        Moments(5, "x", StreamLengths()).update(rows(0, 3, 5), 0)


@pytest.mark.parametrize("memory", [1 << 20, 0])
@pytest.mark.parametrize("intercept", [False, True])
def test_a_regression_on_what_is_left_of_a_target(memory: int, intercept: bool) -> None:
    """In memory or in files: y = x·W + b beside a stream; the weight that is found is the one that made it."""
    weight, bias = rows(3, 4, 2), rows(4, 1, 2) if intercept else np.zeros((1, 2), np.float32)
    target = Target(memory)
    samples = [(rows(10 + i, 40, 4), rows(20 + i, 40, 2), rows(30 + i, 40, 2)) for i in range(3)]
    for number, (x, theirs, ours) in enumerate(samples):
        Plus(target).update(x @ weight + bias + ours - theirs, number)
        Plus(target).update(theirs, number)
        del ours
    target.shift(np.array([5, 6]))
    lengths = target.lengths()
    target.shift(np.array([-5, -6]))
    regression = Regression(target, lengths, (4, 2), "x", intercept=intercept)
    for number, (x, _, ours) in enumerate(samples):
        Minus(target).update(ours, number)
        regression.update(x, number)
    assert (regression.fit.tokens, regression.held_out.tokens) == (3 * (40 - 40 // HELD_OUT), 3 * (40 // HELD_OUT))
    for part in (regression.fit, regression.held_out):
        found = np.linalg.solve(part.second, part.cross)
        np.testing.assert_allclose(found, np.concatenate([weight, bias])[: 4 + intercept], atol=1e-3)
    with pytest.raises(UnsupportedModelError, match=r"rows \[39, 2\] cannot be compared"):
        Minus(target).update(rows(0, 39, 2), 0)
    target.close()
