"""Rounding against its bounds, fitted grids against an exhaustive search, both against onnxruntime's quantizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, unpack
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares, round_to_nearest

EPSILON = np.float32(1e-5)
"""Relative room for float32 rounding in w / s · s."""
FORMATS = st.one_of(
    st.builds(
        BlockFormat,
        st.integers(2, 8),
        st.sampled_from([16, 32, 64]),
        st.sampled_from(["none", "integer"]),
        st.sampled_from(["float32", "float16"]),
    ),
    st.builds(BlockFormat, st.integers(2, 4), st.sampled_from([16, 32]), st.just("float"), st.just("float32")),
)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """[features, outputs] with zeros, constants, blocks of one sign and lone outliers; features need not divide."""
    features, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    low = draw(st.sampled_from([-8.0, 0.0]))
    elements = st.floats(low, 8, width=32, allow_subnormal=False).map(lambda x: np.float32(0 if abs(x) < 1e-3 else x))
    return draw(arrays.arrays(np.float32, (features, outputs), elements=elements))


def by_block(array: np.ndarray, size: int) -> np.ndarray:
    """[features, outputs] -> [outputs, blocks, size], padded with zeros, without the code under test."""
    padded = np.concatenate([array, np.zeros((-len(array) % size, array.shape[1]), array.dtype)])
    return padded.T.reshape(array.shape[1], -1, size)


def squared_errors(weight: np.ndarray, approximation: np.ndarray, size: int) -> np.ndarray:
    return np.asarray((by_block(approximation - weight, size).astype(np.float64) ** 2).sum(axis=-1))


@given(weights(), FORMATS)
@settings(max_examples=150, deadline=None)
def test_rounding_stays_within_its_bound(weight: np.ndarray, format: BlockFormat) -> None:
    blocks = round_to_nearest(weight, format)
    assert blocks.codes.max() <= format.top
    half = format.zero_points == "float" or (format.zero_points == "none" and format.bits == 8)
    steps = np.abs(blocks.scales) * (0.5 if half else 1)
    # A scale rounded to float16 moves the end of the range by up to 2^-11 of it, over at most all of its codes.
    slack = EPSILON if format.scale_type == "float32" else 2.0**-10
    size = format.block_size
    found = np.abs(by_block(blocks.dequantize() - weight, size)).max(axis=-1)
    span = np.ptp(by_block(weight, size), axis=-1) + np.abs(by_block(weight, size)).max(axis=-1)
    assert (found <= steps + slack * span).all()


@given(weights(), FORMATS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_fitting_never_makes_a_block_worse(weight: np.ndarray, format: BlockFormat, weighted: bool) -> None:
    importance = np.random.default_rng(0).uniform(0, 4, len(weight)).astype(np.float32) if weighted else None
    root = np.ones((len(weight), 1)) if importance is None else np.sqrt(importance)[:, None]
    fitted, plain = fit_least_squares(weight, format, importance), round_to_nearest(weight, format)
    ours, theirs = (
        squared_errors(weight * root, blocks.dequantize() * root, format.block_size) for blocks in (fitted, plain)
    )
    # Errors are compared through Σ i w² − gain in float32.
    energy = squared_errors(weight * root, 0 * weight, format.block_size)
    assert (ours <= theirs * (1 + 1e-3) + 1e-5 * energy + 1e-12).all()


def exhaustive(block: np.ndarray, importance: np.ndarray, format: BlockFormat) -> float:
    """The least weighted squared error over a fine grid of scales and all zero points."""
    reach = np.abs(block).max() if format.zero_points == "none" else np.ptp(np.append(block, 0))
    scales = np.outer([1, -1], np.linspace(0.3, 2.5, 1500)).reshape(-1, 1) * reach / format.top
    least = np.inf
    for zero in [format.middle] if format.zero_points == "none" else range(format.top + 1):
        codes = np.clip(np.rint(block / scales + zero), 0, format.top) - zero
        fitted = codes @ (importance * block) / np.maximum(codes**2 @ importance, 1e-30)
        least = min(least, ((block - fitted[:, None] * codes) ** 2 @ importance).min())
    return float(least)


@pytest.mark.parametrize(
    ("bits", "zero_points", "slack"), [(4, "none", 1.04), (4, "integer", 1.08), (3, "none", 1.06), (2, "none", 1.1)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_fitting_comes_close_to_an_exhaustive_search(bits: int, zero_points: Any, slack: float, weighted: bool) -> None:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((32, 12)).astype(np.float32)
    importance = rng.uniform(0.1, 4, 32).astype(np.float32) if weighted else np.ones(32, np.float32)
    format = BlockFormat(bits, 32, zero_points)
    blocks = fit_least_squares(weight, format, importance if weighted else None)
    ours = (importance[:, None] * (blocks.dequantize() - weight) ** 2).sum()
    assert ours <= slack * sum(exhaustive(column, importance, format) for column in weight.T)


@pytest.mark.parametrize("zero_points", ["none", "integer", "float"])
def test_importance_moves_the_error_to_quiet_channels(zero_points: Any) -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((256, 100)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(256)).astype(np.float32)
    format = BlockFormat(4, 32, zero_points)
    with_it, without = (
        (importance[:, None] * (fit_least_squares(weight, format, i).dequantize() - weight) ** 2).sum()
        for i in (importance, None)
    )
    assert with_it < 0.85 * without


def test_fitting_pays_on_normal_weights() -> None:
    weight = np.random.default_rng(0).standard_normal((256, 200)).astype(np.float32)
    for format, share in (
        (BlockFormat(4, 32), 0.92),
        (BlockFormat(4, 32, "integer"), 0.94),
        (BlockFormat(2, 32), 0.85),
    ):
        fitted, plain = (
            ((method(weight, format).dequantize() - weight) ** 2).mean()
            for method in (fit_least_squares, round_to_nearest)
        )
        assert fitted < share * plain


@pytest.mark.parametrize(("bits", "low"), [(4, -8), (8, -127)])
def test_symmetric_grids_are_found_again_exactly(bits: int, low: int) -> None:
    """GGUF's Q4_0 and Q8_0: d · q with a float16 d, the weight of largest magnitude being d · low."""
    generator = np.random.default_rng(1)
    q = generator.integers(low, -low, (32, 500))
    q[3] = low
    d = generator.choice([-1, 1], (1, 500)) * generator.uniform(1e-4, 1e-1, (1, 500)).astype(np.float16)
    w = d.astype(np.float32) * q.astype(np.float32)
    for method in (round_to_nearest, fit_least_squares):
        np.testing.assert_allclose(method(w, BlockFormat(bits, 32)).dequantize(), w, rtol=3e-7)
        if bits == 4 or (d > 0).all():
            half = method(w, BlockFormat(bits, 32, scale_type="float16"))
            np.testing.assert_array_equal(half.dequantize(), w)


def test_q4_1_is_found_again_with_a_float_zero_point() -> None:
    """w = d · q + m with float16 d and m; all 16 codes' ends occur, as they do in a Q4_1 block."""
    generator = np.random.default_rng(2)
    q = generator.integers(0, 16, (32, 500))
    q[0], q[1] = 0, 15
    d = generator.uniform(1e-3, 1e-1, (1, 500)).astype(np.float16).astype(np.float32)
    m = (-d * generator.uniform(2, 12, (1, 500))).astype(np.float16).astype(np.float32)
    w = (d * q + m).astype(np.float32)
    for method in (round_to_nearest, fit_least_squares):
        blocks = method(w, BlockFormat(4, 32, "float"))
        np.testing.assert_array_equal(blocks.codes[:, 0].T, q)
        np.testing.assert_allclose(blocks.dequantize(), w, atol=1e-6 * np.abs(w).max())


@given(FORMATS, st.sampled_from([0.0, 0.75, -0.75, 2.0**100, -(2.0**100), 3e38, 1e-42]), st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_constant_blocks_whatever_their_size(format: BlockFormat, value: float, features: int) -> None:
    if format.scale_type == "float16" and abs(value) > 2.0**20:
        with pytest.raises(ValueError, match="do not fit in float16"):
            round_to_nearest(np.full((features, 2), value, np.float32), format)
        return
    weight = np.full((features, 2), value, np.float32)
    for method in (round_to_nearest, fit_least_squares):
        found = method(weight, format).dequantize()
        # float16's smallest number is the finest step there is; scales below float32's smallest normal one are zero.
        absolute = 2.0**-24 if format.scale_type == "float16" else 1e-37
        relative = 2.0**-10 if format.scale_type == "float16" else 1e-6
        np.testing.assert_allclose(found, weight, rtol=relative, atol=absolute)


def test_importance_must_make_sense() -> None:
    weight = np.ones((32, 2), np.float32)
    for bad in (np.full(32, -1.0), np.full(32, np.nan)):
        with pytest.raises(ValueError, match="importance"):
            fit_least_squares(weight, BlockFormat(4, 32), bad.astype(np.float32))
    silent = fit_least_squares(weight, BlockFormat(4, 32), np.zeros(32, np.float32))
    np.testing.assert_allclose(silent.dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_same_grids_as_onnxruntimes_quantizer_and_better_codes(symmetric: bool) -> None:
    quantizers = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    w = np.random.default_rng(4).standard_normal((128, 96)).astype(np.float32)
    config = quantizers.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=4)
    packed, scales, zero_points = quantizers.DefaultWeightOnlyQuantizer(config).qbits_block_quant(w)
    format = BlockFormat(4, 32, "none" if symmetric else "integer")
    ours = round_to_nearest(w, format)
    np.testing.assert_allclose(ours.scales, scales.reshape(96, 4), rtol=1e-6)
    codes = unpack(packed.reshape(96, 4, 16), 4, 32)
    zero = np.full((96, 4), 8.0) if symmetric else unpack(zero_points.reshape(96, 2), 4, 4)
    np.testing.assert_array_equal(ours.zero_points, zero)
    assert np.abs(ours.codes.astype(int) - codes).max() <= 1  # they round halves up, we to even
    assert (ours.codes != codes).mean() < 1e-3
    theirs = ((codes - zero[..., None]) * scales.reshape(96, 4, 1)).reshape(96, 128).T
    fitted = fit_least_squares(w, format).dequantize()
    assert ((fitted - w) ** 2).mean() < 0.95 * ((theirs - w) ** 2).mean()
