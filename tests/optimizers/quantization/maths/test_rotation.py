"""Hadamard rotations: orthogonal, and what they do to outliers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.optimizers.quantization.maths.rotation import hadamard, rotate_channels


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_orthogonal_and_symmetric(size: int) -> None:
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(np.abs(matrix), 1 / np.sqrt(size), rtol=1e-6)


@pytest.mark.parametrize("size", [0, -2, 3, 12])
def test_powers_of_two_only(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard(size)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_products_stay(exponent: int, runs: int, seed: int) -> None:
    rng, rotation = np.random.default_rng(seed), hadamard(1 << exponent)
    features = runs * len(rotation)
    x, weight = rng.standard_normal((3, features)), rng.standard_normal((features, 5))
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    rotated = rotate_channels(x, rotation) @ rotate_channels(np.ascontiguousarray(weight.T), rotation).T
    # Each of `features` terms is rounded a handful of times, relative 6e-8.
    bound = 1e-6 * features * np.linalg.norm(x, axis=1).max() * np.linalg.norm(weight, axis=0).max()
    np.testing.assert_allclose(rotated, x @ weight, atol=bound)


def test_one_loud_channel_is_spread() -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, 21] = 100
    rotated = rotate_channels(x, hadamard(16))
    np.testing.assert_allclose(np.abs(rotated[0, 16:32]), 25, rtol=1e-6)
    assert not rotated[0, :16].any()
    assert not rotated[0, 32:].any()
