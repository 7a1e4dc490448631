"""Rescaling of channels: exact, balanced, and never worse than leaving them alone."""

from __future__ import annotations

import numpy as np
import pytest

from onnxpress.optimizers.quantization.maths.block_format import BlockFormat
from onnxpress.optimizers.quantization.maths.channel_scaling import awq, equalizing_factors, smoothing_factors
from onnxpress.optimizers.quantization.maths.gptq import relative_error
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares, round_to_nearest


def products(seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two weights, activations with loud channels, and their Gram matrix."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((96, outputs)).astype(np.float32) for outputs in (32, 16)]
    x = rng.standard_normal((500, 96)) * np.exp(1.5 * rng.standard_normal(96))
    return weights, x, x.T @ x / len(x)


def test_smoothing_factors() -> None:
    factors = smoothing_factors(np.array([1, 16, 0], np.float32), np.array([1, 1, 1], np.float32), 0.5)
    assert np.isfinite(factors).all()
    assert factors[1] / factors[0] == pytest.approx(4)
    assert np.log(factors).sum() == pytest.approx(0, abs=1e-5)


def test_equalized_weights_reach_equally_far_and_compute_the_same() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((20, 30)), rng.standard_normal((30, 10))
    first *= np.exp(rng.standard_normal(30))
    peaks = [np.abs(first).max(axis=0).astype(np.float32), np.abs(second).max(axis=1).astype(np.float32)]
    factors = equalizing_factors(*peaks)
    ratio = (peaks[0] / factors) / (peaks[1] * factors)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    x = rng.standard_normal((5, 20))
    relu = np.maximum(x @ (first / factors), 0) @ (factors[:, None] * second)
    np.testing.assert_allclose(relu, np.maximum(x @ first, 0) @ second, rtol=1e-5, atol=1e-5)


def test_awq_at_strength_zero_is_rounding() -> None:
    weights, x, gram = products(2)
    format = BlockFormat(4, 32)
    found = awq(weights, np.abs(x).mean(axis=0).astype(np.float32), gram, format, strengths=(0.0,))
    np.testing.assert_array_equal(found.factors, 1)
    assert found.error == found.plain_error
    (single,) = (awq(weights[:1], np.abs(x).mean(axis=0).astype(np.float32), gram, format, strengths=()),)
    rounded = round_to_nearest(weights[0], format).dequantize()
    assert single.error == pytest.approx(relative_error(weights[0], rounded, gram), rel=1e-5)


@pytest.mark.parametrize("quantize", [round_to_nearest, fit_least_squares])
def test_awq_lowers_the_error_it_reports(quantize: object) -> None:
    shares = []
    for seed in range(8):
        weights, x, gram = products(seed)
        format = BlockFormat(4, 32, "integer")
        found = awq(weights, np.abs(x).mean(axis=0).astype(np.float32), gram, format, quantize=quantize)  # type: ignore[arg-type]
        lost = kept = 0.0
        for weight in weights:
            scaled = quantize(found.factors[:, None] * weight, format).dequantize()  # type: ignore[operator]
            lost += float((((x / found.factors) @ scaled - x @ weight) ** 2).sum())
            kept += float(((x @ weight) ** 2).sum())
        assert found.error == pytest.approx(lost / kept, rel=1e-3)
        assert found.error <= found.plain_error
        shares.append(found.error / found.plain_error)
    assert np.mean(shares) < 0.9


def test_silent_channels_do_not_explode() -> None:
    weights, x, gram = products(3)
    magnitudes = np.abs(x).mean(axis=0).astype(np.float32)
    magnitudes[:5] = 0
    found = awq(weights, magnitudes, gram, BlockFormat(4, 32))
    assert np.isfinite(found.factors).all()
    assert found.factors.max() / found.factors.min() <= 1e4 * (1 + 1e-4)
    assert awq(weights, np.zeros(96, np.float32), 0 * gram, BlockFormat(4, 32)).error == 0
