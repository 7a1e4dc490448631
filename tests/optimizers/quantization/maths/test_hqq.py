"""HQQ: its objective falls round by round, and outliers stop dictating the grid."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks
from onnxpress.optimizers.quantization.maths.hqq import hqq
from onnxpress.optimizers.quantization.maths.least_squares import round_to_nearest

KINDS = ["none", "integer", "float"]


def weights_with_outliers(seed: int, features: int = 128, outputs: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.asarray(0.02 * rng.standard_t(3, (features, outputs)), dtype=np.float32)


def objective(weight: np.ndarray, blocks: QuantizedBlocks, exponent: float = 0.7) -> float:
    """Σ |w − ŵ|^p in steps of each block's first grid, as the method counts."""
    first = round_to_nearest(weight, blocks.format)
    size = np.repeat(np.abs(first.scales), blocks.format.block_size, axis=1)[:, : len(weight)].T
    return float((np.abs((weight - blocks.dequantize()) / np.where(size == 0, 1, size)) ** exponent).sum())


@given(st.integers(0, 1000), st.sampled_from(KINDS), st.integers(2, 4), st.sampled_from([100, 128]))
@settings(max_examples=30, deadline=None)
def test_the_objective_never_rises(seed: int, zero_points: Any, bits: int, features: int) -> None:
    weight = weights_with_outliers(seed, features, 6)
    format = BlockFormat(bits, 32, zero_points)
    course = [objective(weight, hqq(weight, format, rounds=rounds)) for rounds in (0, 1, 2, 5, 10, 20)]
    assert course[0] == pytest.approx(objective(weight, round_to_nearest(weight, format)))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(course))


@pytest.mark.parametrize("zero_points", KINDS)
def test_most_weights_fit_better_than_by_rounding(zero_points: Any) -> None:
    weight = weights_with_outliers(0)
    format = BlockFormat(4, 64, zero_points)
    ours, theirs = (np.abs(method(weight, format).dequantize() - weight) for method in (hqq, round_to_nearest))
    assert np.median(ours) < 0.95 * np.median(theirs)


def test_zeros_stay_zeros_and_sizes_do_not_matter() -> None:
    weight = weights_with_outliers(1)
    weight[:64] = 0
    format = BlockFormat(4, 64, "integer")
    found = hqq(weight, format)
    np.testing.assert_array_equal(found.dequantize()[:64], 0)
    np.testing.assert_array_equal(found.codes, hqq(weight * 1024, format).codes)


def test_exponents_outside_its_theory_are_refused() -> None:
    with pytest.raises(ValueError, match="exponent"):
        hqq(weights_with_outliers(0), BlockFormat(4, 32), exponent=0)
