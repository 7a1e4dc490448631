"""A scale per output channel, and integer biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxpress.optimizers.quantization.maths.channels import (
    dequantize_channels,
    least_weight_scales,
    quantize_bias,
    quantize_channels,
)

EPSILON = np.float32(1e-5)
"""Relative room for float32 rounding in w / s · s."""
WEIGHTS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.integers(1, 6)),
    elements=st.floats(-8, 8, width=32, allow_subnormal=False).map(lambda x: np.float32(0 if abs(x) < 1e-6 else x)),
)


@given(WEIGHTS, st.sampled_from(["int8", "uint8"]))
@settings(max_examples=60, deadline=None)
def test_channels_stay_within_their_bound(w: np.ndarray, kind: Any) -> None:
    codes, scales, zero_points = quantize_channels(w, kind)
    assert codes.dtype == zero_points.dtype == kind
    error = np.abs(dequantize_channels(codes, scales, zero_points) - w).max(axis=0)
    bound = scales / 2 if kind == "int8" else scales
    assert (error <= bound + EPSILON * np.abs(w).max(axis=0)).all()
    assert codes.min() >= (-127 if kind == "int8" else 0)


def test_zero_channels_stay_zero() -> None:
    w = np.zeros((8, 2), np.float32)
    w[:, 1] = 1
    for kind in ("int8", "uint8"):
        codes, scales, zero_points = quantize_channels(w, kind)  # type: ignore[arg-type]
        np.testing.assert_array_equal(dequantize_channels(codes, scales, zero_points), w)


def test_biases_are_rounded_at_the_products_scale() -> None:
    rng = np.random.default_rng(0)
    bias, scales = rng.standard_normal(50).astype(np.float32), rng.uniform(1e-3, 1e-2, 50).astype(np.float32)
    codes = quantize_bias(bias, 0.02, scales)
    assert codes.dtype == np.int32
    assert (np.abs(codes * (0.02 * scales.astype(np.float64)) - bias) <= 0.02 * scales / 2 * (1 + 1e-6)).all()


def test_biases_that_overflow_are_refused_and_what_would_do_is_told() -> None:
    bias, scales = np.array([1, 1e3], np.float32), np.array([1e-3, 1e-9], np.float32)
    with pytest.raises(ValueError, match="bias 1000 of channel 1 does not fit"):
        quantize_bias(bias, 1e-3, scales)
    enough = np.maximum(scales, least_weight_scales(bias, 1e-3))
    assert enough[0] == scales[0]
    assert quantize_bias(bias, 1e-3, enough)[1] == pytest.approx(1 << 30, rel=1e-6)
