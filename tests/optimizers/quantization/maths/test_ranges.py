"""Ranges of activations against onnxruntime's collectors on the same histograms, and against exhaustive search."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.quantization.maths.histogram import Histogram
from onnxpress.optimizers.quantization.maths.ranges import (
    activation_grid,
    entropy,
    entropy_threshold,
    mean_squared_error,
    min_max,
    percentile,
)

calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
DISTRIBUTIONS = ["normal", "laplace", "student", "relu", "skewed"]


def activation(kind: str, seed: int = 0, size: int = 20_011) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = {
        "normal": rng.standard_normal,
        "laplace": lambda n: rng.laplace(size=n),
        "student": lambda n: rng.standard_t(3, n),
        "relu": lambda n: np.maximum(rng.standard_normal(n), 0),
        "skewed": lambda n: rng.gamma(2, 1, n) - 0.5,
    }[kind](size)
    return np.asarray(x, dtype=np.float32)


def histogram_of(x: np.ndarray) -> Histogram:
    histogram = Histogram("x")
    histogram.update(x, 0)
    return histogram


def collector(method: str, symmetric: bool, share: float = 99.9) -> Any:
    return calibrate.HistogramCollector(method, symmetric, 2048, 128, share, "same")


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("share", [99.0, 99.9, 100.0])
def test_percentiles_are_onnxruntimes(kind: str, symmetric: bool, share: float) -> None:
    histogram = histogram_of(activation(kind))
    counts, edges = histogram.magnitudes() if symmetric else (histogram.counts, histogram.edges())
    theirs = collector("percentile", symmetric, share)
    theirs.histogram_dict = {"x": (counts, edges, np.float64(histogram.low), np.float64(histogram.high))}
    low, high, *_ = (float(value) for value in theirs.compute_percentile()["x"][:2])
    ours = percentile(histogram, share, symmetric=symmetric)
    largest = max(abs(histogram.low), abs(histogram.high)) if symmetric else histogram.high
    # They take the lower edge of the bin at either end, which clips a little more than the share at the upper one.
    if high < histogram.high:
        assert ours[1] == min(high + edges[1] - edges[0], largest)
    else:
        assert ours[1] == largest
    assert ours[0] == (-ours[1] if symmetric else low)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_percentiles_clip_the_share_they_say(kind: str) -> None:
    x = activation(kind)
    low, high = percentile(histogram_of(x), 99)
    assert ((x < low) | (x > high)).mean() == pytest.approx(0.01, abs=0.003 if kind != "relu" else 0.006)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_entropy_is_near_onnxruntimes(kind: str) -> None:
    """On the same histogram. Theirs rounds the spread counts down to integers and leaves out the last few bins.

    Distributions with heavy tails have flat minima, which these differences move about: see the test bin by bin.
    """
    histogram = histogram_of(activation(kind, size=100_000))
    counts, edges = histogram.symmetric(512)
    theirs = collector("entropy", True)
    limits = np.float64(histogram.low), np.float64(histogram.high)
    low, high = theirs.get_entropy_threshold((counts, edges, *limits, None), 128)
    assert entropy_threshold(counts, edges, 128) == pytest.approx(max(-low, high), rel=0.15)


def slow_entropy(counts: np.ndarray, levels: int) -> int:
    """The candidate of least divergence, bin by bin."""
    half, best = len(counts) // 2, (np.inf, 0)
    for reach in range(levels // 2, half + 1):
        inside = [int(count) for count in counts[half - reach : half + reach]]
        p = [float(count) for count in inside]
        p[0] += float(sum(counts[: half - reach]))
        p[-1] += float(sum(counts[half + reach :]))
        width = len(inside) // levels
        q = [0.0] * len(inside)
        for level in range(levels):
            stop = (level + 1) * width if level < levels - 1 else len(inside)
            bins = [index for index in range(level * width, stop) if p[index] > 0]
            for index in bins:
                q[index] = sum(inside[level * width : stop]) / len(bins)
        divergence = np.inf
        if any(q):
            p, q = (
                [value - 1e-4 * r.count(0) / (len(r) - r.count(0)) if value else 1e-4 for value in r] for r in (p, q)
            )
            divergence = sum(a / sum(p) * np.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        best = min(best, (divergence, reach))
    return half + best[1]


@pytest.mark.parametrize("kind", ["laplace", "skewed"])
def test_entropy_bin_by_bin(kind: str) -> None:
    counts, edges = histogram_of(activation(kind, size=3000)).symmetric(128)
    assert entropy_threshold(counts, edges, 16) == edges[slow_entropy(counts, 16)]


def test_entropy_ignores_a_few_outliers() -> None:
    x = activation("normal", size=100_000)
    x[:3] = 60, -60, 50
    low, high = entropy(histogram_of(x))
    assert 2.5 < high < 20
    assert low == -high


def fake_quantized(x: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> np.ndarray:
    top = 2**bits - (2 if symmetric else 1)
    scale = (high - low) / top
    zero = top / 2 if symmetric else np.rint(-low / scale)
    return np.asarray(scale * (np.clip(np.rint(x / scale) + zero, 0, top) - zero))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mean_squared_error_is_near_the_least(kind: str, bits: int, symmetric: bool) -> None:
    """Against all pairs of ends on a grid, with the values themselves instead of their bins."""
    x = activation(kind, size=20_000)
    histogram = histogram_of(x)

    def cost(low: float, high: float) -> float:
        return float(((fake_quantized(x, low, high, bits, symmetric) - x) ** 2).mean())

    ends = np.linspace(0.05, 1, 20)
    bottom, top = min(histogram.low, 0), max(histogram.high, 0)
    if symmetric:
        least = min(cost(-end * max(-bottom, top), end * max(-bottom, top)) for end in np.linspace(0.02, 1, 99))
    else:
        least = min(cost(bottom * a, top * b) for a in (ends if bottom else [1]) for b in ends)
    found = mean_squared_error(histogram, bits, symmetric=symmetric)
    assert cost(*found) <= 1.02 * least
    assert cost(*found) <= cost(*min_max(histogram, symmetric=symmetric)) * 1.001
    assert found[0] <= 0 <= found[1]
    assert found[0] == -found[1] if symmetric else bottom <= found[0] and found[1] <= top


@pytest.mark.parametrize("method", [min_max, percentile, mean_squared_error, entropy])
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-30, 1e30])
def test_constant_activations(method: Any, value: float) -> None:
    low, high = method(histogram_of(np.full(100, value, np.float32)))
    assert np.isfinite([low, high]).all()
    assert low <= high
    scale, zero = activation_grid(low, high, np.uint8)
    code = np.clip(np.rint(value / scale) + zero, 0, 255)
    assert scale * (code - zero) == pytest.approx(value, rel=0.01, abs=1e-20)


FINITE = st.floats(-100, 100, width=32)


@given(FINITE, FINITE, st.sampled_from(["int8", "uint8", "int16", "uint16"]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_grids_are_onnxruntimes(one: float, other: float, dtype: str, symmetric: bool) -> None:
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    low, high = sorted((one, other))
    limits = np.iinfo(dtype)
    bottom = -limits.max if symmetric and limits.min else limits.min  # as get_qmin_qmax_for_qType has it
    theirs = compute_scale_zp(
        np.float32(low), np.float32(high), np.array(bottom, dtype), np.array(limits.max, dtype), symmetric
    )
    scale, zero_point = activation_grid(low, high, dtype, symmetric=symmetric)
    assert zero_point.dtype == dtype
    assert (int(zero_point), float(scale)) == (int(theirs[0]), pytest.approx(float(theirs[1]), rel=1e-6))


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        percentile(histogram_of(activation("normal")), 0)
