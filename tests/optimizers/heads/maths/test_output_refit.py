"""The output refitted: regression with an intercept where there is a bias, held where it was by the ridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxpress.optimizers.fitting.ridge import Normal
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.maths.output_refit import output_error, refit_output

Function = Callable[..., Any]


def problem(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Normal]:
    """States around 3 and outputs around -7, in parts, and their sums."""
    x, y = rng.standard_normal((90, 6)) + 3, rng.standard_normal((90, 5)) - 7
    normal = Normal.empty(7, 5)
    for rows, wanted in zip(np.array_split(x, 4), np.array_split(y, 4), strict=True):
        normal.add(np.column_stack([rows, np.ones(len(rows))]).astype(np.float32), wanted.astype(np.float32))
    return x, y, normal


def test_with_a_bias_it_is_regression_with_an_intercept(rng: np.random.Generator, random_weights: Function) -> None:
    x, y, normal = problem(rng)
    weights: AttentionWeights = random_weights(rng, 5, 2, 2, 3)
    found = refit_output(weights, normal, 0.0, centred=True)
    expected, *_ = np.linalg.lstsq(np.column_stack([x, np.ones(90)]), y, rcond=None)
    np.testing.assert_allclose(found.output.reshape(6, 5), expected[:6], atol=1e-3)
    np.testing.assert_allclose(found.offset, expected[6], atol=1e-2)
    residual = np.column_stack([x, np.ones(90)]) @ expected - y
    assert output_error(found, normal) == pytest.approx(np.square(residual).sum() / np.square(y).sum(), rel=1e-4)
    assert output_error(weights, normal) > output_error(found, normal)


def test_without_a_bias_the_offset_stays(rng: np.random.Generator, random_weights: Function) -> None:
    x, y, normal = problem(rng)
    weights: AttentionWeights = random_weights(rng, 5, 2, 2, 3, bias=False)
    found = refit_output(weights, normal, 0.0, centred=False)
    expected, *_ = np.linalg.lstsq(x, y, rcond=None)
    np.testing.assert_allclose(found.output.reshape(6, 5), expected, atol=1e-4)
    assert not found.offset.any()


def test_a_strong_ridge_holds_what_was_there(rng: np.random.Generator, random_weights: Function) -> None:
    _, _, normal = problem(rng)
    weights: AttentionWeights = random_weights(rng, 5, 2, 2, 3)
    found = refit_output(weights, normal, 1e9, centred=True)
    np.testing.assert_allclose(found.output, weights.output, atol=1e-6)
