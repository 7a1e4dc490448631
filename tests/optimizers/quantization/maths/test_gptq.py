"""GPTQ against optimal brain quantization written out step by step, and against rounding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks
from onnxpress.optimizers.quantization.maths.gptq import gptq, relative_error
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares, round_to_nearest


def correlated(rng: np.random.Generator, features: int, tokens: int) -> np.ndarray:
    """Activations with correlations and a few loud channels."""
    mixing = rng.standard_normal((features, features)) / features**0.5
    return np.asarray(rng.standard_normal((tokens, features)) @ mixing * np.exp(rng.standard_normal(features)))


def case(seed: int, features: int = 96, outputs: int = 24, tokens: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = correlated(rng, features, tokens)
    return rng.standard_normal((features, outputs)).astype(np.float32), x.T @ x / tokens


def optimal_brain_quantization(
    weight: np.ndarray, gram: np.ndarray, grid: QuantizedBlocks, damping: float, order: Any
) -> Any:
    """The published recursion, one input at a time with the inverse Hessian shrinking, in double precision.

    Rounding input k to ŵ_k, the inputs that remain move by −(w_k − ŵ_k) · H⁻¹[k, rest] / H⁻¹[k, k], and row and
    column k leave the inverse.
    """
    hessian = gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram))
    inverse = np.linalg.inv(hessian)
    remaining, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    size, top = grid.format.block_size, grid.format.top
    visit = np.argsort(-np.diag(hessian), kind="stable") if order == "activation" else range(len(gram))
    for k in visit:
        scale, zero = grid.scales[:, k // size].astype(np.float64), grid.zero_points[:, k // size]
        codes[k] = np.clip(np.rint(remaining[k] / scale + zero), 0, top)
        error = remaining[k] - scale * (codes[k] - zero)
        remaining -= np.outer(inverse[:, k] / inverse[k, k], error)
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("zero_points", ["none", "integer", "float"])
@pytest.mark.parametrize(("features", "size"), [(96, 32), (300, 64), (50, 16)])
def test_the_same_codes_as_optimal_brain_quantization(order: Any, zero_points: Any, features: int, size: int) -> None:
    weight, gram = case(1, features, 10)
    format = BlockFormat(4, size, zero_points)
    grid = fit_least_squares(weight, format)
    ours = gptq(weight, gram, format, order=order, damping=0.01, sweeps=0, grid=grid).blocks
    codes = ours.codes.reshape(10, -1)[:, :features].T
    expected = optimal_brain_quantization(weight, gram, grid, 0.01, order)
    # A tie between two codes may fall differently in single precision, and then changes what comes after it.
    assert (codes == expected).mean() > 0.99
    np.testing.assert_array_equal(ours.scales, grid.scales)


@given(st.integers(0, 99), st.sampled_from(["none", "integer"]), st.integers(2, 8), st.integers(20, 70))
@settings(max_examples=30, deadline=None)
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(seed: int, zeros: Any, bits: int, features: int) -> None:
    weight, _ = case(seed, features, 5)
    format = BlockFormat(bits, 16, zeros)
    grid = round_to_nearest(weight, format)
    found = gptq(weight, np.eye(features), format, sweeps=0, grid=grid)
    np.testing.assert_array_equal(found.blocks.codes, grid.codes)
    swept = gptq(weight, np.eye(features), format, sweeps=2, grid=grid)
    assert swept.error <= found.error * (1 + 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_points", ["none", "integer"])
def test_better_than_rounding_on_correlated_inputs(bits: int, zero_points: Any) -> None:
    """In the mean over twenty products, by far; the least-squares grids are the harder opponent."""
    format = BlockFormat(bits, 32, zero_points)
    shares = []
    for seed in range(20):
        weight, gram = case(seed)
        fitted = fit_least_squares(weight, format, np.diag(gram).astype(np.float32)).dequantize()
        shares.append(gptq(weight, gram, format).error / relative_error(weight, fitted, gram))
    assert np.mean(shares) < 0.6
    assert max(shares) < 1


def test_sweeps_only_lower_the_damped_error() -> None:
    for scale_type in ("float32", "float16"):
        weight, gram = case(3, 256, 40, 300)
        damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(256)
        format = BlockFormat(3, 32, "integer", scale_type)  # type: ignore[arg-type]
        course = [
            relative_error(weight, gptq(weight, gram, format, damping=0.01, sweeps=sweeps).blocks.dequantize(), damped)
            for sweeps in range(5)
        ]
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(course))
        assert course[4] < 0.97 * course[0]


def test_activation_order_pays_where_channels_differ() -> None:
    errors: dict[Any, list[float]] = {"activation": [], "natural": []}
    for seed in range(10):
        weight, gram = case(seed)
        for order, found in errors.items():
            found.append(gptq(weight, gram, BlockFormat(4, 32), order=order, sweeps=0).error)
    assert np.mean(errors["activation"]) < np.mean(errors["natural"])


@pytest.mark.parametrize("zero_points", ["none", "integer", "float"])
def test_float16_scales_and_offsets_are_what_is_stored(zero_points: Any) -> None:
    weight, gram = case(5)
    blocks = gptq(weight, gram, BlockFormat(4, 32, zero_points, "float16")).blocks
    np.testing.assert_array_equal(blocks.scales.astype(np.float16).astype(np.float32), blocks.scales)
    if zero_points == "float":
        offsets = (8 - blocks.zero_points) * blocks.scales
        # The difference of two numbers up to 8, times a scale.
        assert (
            np.abs(offsets.astype(np.float16) - offsets) <= 1e-6 * (np.abs(offsets) + 8 * np.abs(blocks.scales))
        ).all()


def test_silent_channels_and_silent_products() -> None:
    """A channel that is always zero costs nothing and is rounded; so is everything if all are."""
    weight, gram = case(6)
    gram[7], gram[:, 7] = 0, 0
    format = BlockFormat(8, 32)
    found = gptq(weight, gram, format)
    assert np.abs(found.blocks.dequantize()[7] - weight[7]).max() <= np.abs(found.blocks.scales).max()
    nothing = gptq(weight, np.zeros_like(gram), format)
    assert nothing.error == 0
    assert np.abs(nothing.blocks.dequantize() - weight).max() <= np.abs(nothing.blocks.scales).max()


def test_fewer_samples_than_features_are_damped() -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((20, 96))
    weight = rng.standard_normal((96, 8)).astype(np.float32)
    assert gptq(weight, x.T @ x / 20, BlockFormat(4, 32)).error < 0.01


def test_the_error_is_the_products() -> None:
    rng = np.random.default_rng(8)
    x = correlated(rng, 64, 500)
    weight = rng.standard_normal((64, 16)).astype(np.float32)
    found = gptq(weight, x.T @ x / 500, BlockFormat(4, 32))
    difference = x @ (found.blocks.dequantize() - weight)
    assert found.error == pytest.approx((difference**2).sum() / ((x @ weight) ** 2).sum(), rel=1e-3)


def test_what_is_refused() -> None:
    weight, gram = case(9)
    format = BlockFormat(4, 32)
    with pytest.raises(ValueError, match=r"gram must be \[96, 96\]"):
        gptq(weight, gram[:50, :50], format)
    with pytest.raises(ValueError, match="NaN"):
        gptq(weight, np.where(np.eye(96, dtype=bool), np.nan, gram), format)
    with pytest.raises(ValueError, match="positive semi-definite"):
        gptq(weight, -gram, format)
    with pytest.raises(ValueError, match="order"):
        gptq(weight, gram, format, order="random")  # type: ignore[arg-type]
