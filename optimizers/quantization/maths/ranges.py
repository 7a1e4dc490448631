"""The range to quantize an activation to, from its histogram.

A range as wide as the values wastes codes on the few loudest; these methods weigh what clipping costs against what
finer steps gain:

min_max               nothing is clipped
percentile            a fixed share of the values is
mean_squared_error    the least squared error, of rounding and clipping together
entropy               the least information lost, by the measure of TensorRT and onnxruntime: symmetric about zero

All return (low, high) within what was seen, except that a range with `symmetric` is (−t, t). The mean of the samples'
own ranges is kept by `onnxpress.optimizers.fitting.statistics.AverageRange`, which needs no histogram.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnxpress.arrays import Doubles, Floats, Integers
from onnxpress.optimizers.fitting.statistics import require_data
from onnxpress.optimizers.quantization.maths.histogram import Histogram

Range = tuple[float, float]

ENTROPY_BINS = 2048
"""Bins of the values' whole range; its candidates are every symmetric number of them."""
SMOOTHING = 1e-4
"""The count that empty bins get, so that a divergence is finite."""


def min_max(histogram: Histogram, *, symmetric: bool = False) -> Range:
    require_data(len(histogram.counts), histogram.tensor)
    if symmetric:
        largest = max(abs(histogram.low), abs(histogram.high))
        return -largest, largest
    return histogram.low, histogram.high


def percentile(histogram: Histogram, share: float = 99.99, *, symmetric: bool = False) -> Range:
    """Clip 100 − `share` percent of the values, or less by a bin: half at either end or, if symmetric, the loudest."""
    if not 0 < share <= 100:
        raise ValueError(f"share must lie in 0 … 100, not {share}")
    low, high = min_max(histogram, symmetric=symmetric)
    if symmetric:
        counts, edges = histogram.magnitudes()
        largest = min(high, float(edges[_quantile_bin(counts, share / 100) + 1]))
        return -largest, largest
    cut, edges = (100 - share) / 200, histogram.edges()
    bottom, top = (_quantile_bin(histogram.counts, part) for part in (cut, 1 - cut))
    return max(low, float(edges[bottom])), min(high, float(edges[top + 1]))


def _quantile_bin(counts: Integers, part: float) -> int:
    """The bin that the quantile lies in."""
    cumulative = np.cumsum(counts) / counts.sum()
    return int(np.searchsorted(cumulative, part))


def mean_squared_error(histogram: Histogram, bits: int = 8, *, symmetric: bool = False) -> Range:
    """The range whose 2^bits codes, 0.0 among them, have the least squared error. Each end is searched in turn."""
    low, high = min_max(histogram, symmetric=symmetric)
    counts, edges = histogram.counts, histogram.edges()
    filled = counts > 0
    values, weights = ((edges[1:] + edges[:-1]) / 2)[filled], counts[filled].astype(np.float64)
    low, high = min(low, 0.0), max(high, 0.0)

    def cost(low: float, high: float) -> float:
        top = (1 << bits) - (2 if symmetric else 1)
        scale = (high - low) / top or 1.0
        zero = top // 2 if symmetric else np.rint(-low / scale)
        codes = np.clip(np.rint(values / scale) + zero, 0, top)
        return float(weights @ (values - scale * (codes - zero)) ** 2)

    both = min(np.geomspace(1, 1 / 128, 100), key=lambda factor: cost(low * factor, high * factor))
    both = min(both * np.linspace(0.95, 1.05, 41), key=lambda factor: cost(low * factor, high * factor))
    low, high = low * both, high * both
    if not symmetric:
        near = np.geomspace(1.5, 0.25, 40)
        bottom, top = min(histogram.low, 0.0), max(histogram.high, 0.0)
        for _ in range(2):
            low = min((max(bottom, low * factor) for factor in (1, *near)), key=lambda end: cost(end, high))
            high = min((min(top, high * factor) for factor in (1, *near)), key=lambda end: cost(low, end))
    return float(low), float(high)


def entropy(histogram: Histogram, levels: int = 128) -> Range:
    """The symmetric range whose `levels` steps keep the shape of the distribution best; for int8 that is half of them.

    Half, because TensorRT and onnxruntime compare distributions at 128 levels. Kullback-Leibler divergence from the
    clipped values, those outside counted at the ends, to their quantization, spread over the bins that hold values.
    """
    low, high = min_max(histogram)
    counts, edges = histogram.symmetric(ENTROPY_BINS)
    limit = entropy_threshold(counts, edges, levels)
    return max(low, -limit), min(high, limit)


def entropy_threshold(counts: Integers, edges: Doubles, levels: int) -> float:
    """The best |x| to clip at, of the edges of an even number of bins about zero."""
    half = len(counts) // 2
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    best, least = float(edges[-1]), np.inf
    for reach in range(levels // 2, half + 1):
        inside = counts[half - reach : half + reach]
        clipped = inside.astype(np.float64)
        clipped[0] += cumulative[half - reach]
        clipped[-1] += cumulative[-1] - cumulative[half + reach]
        width = len(inside) // levels
        starts = np.minimum(np.arange(levels) * width, len(inside) - 1)  # the last level takes what is left over
        filled = clipped > 0
        sizes = np.diff(np.append(starts, len(inside)))
        share = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(filled.astype(np.int64), starts), 1)
        divergence = _divergence(clipped, np.where(filled, np.repeat(share, sizes), 0))
        if divergence < least:
            best, least = float(edges[half + reach]), divergence
    return best


def _divergence(reference: Doubles, approximation: Doubles) -> float:
    """Σ p log(p / q) of two histograms, both smoothed; infinite where the approximation is empty."""
    if not approximation.any():
        return np.inf
    p, q = _smoothed(reference), _smoothed(approximation)
    p, q = p / p.sum(), q / q.sum()
    return float(p @ np.log(p / q))


def _smoothed(counts: Doubles) -> Doubles:
    """Empty bins get a little of the others' counts."""
    empty = counts == 0
    return np.where(empty, SMOOTHING, counts - SMOOTHING * empty.sum() / (len(counts) - empty.sum()))


def round_trip(x: Floats, scale: Any, zero_point: NDArray[Any]) -> Floats:
    """x to codes of the zero point's type and back, as QuantizeLinear and DequantizeLinear do."""
    limits = np.iinfo(zero_point.dtype)
    codes = np.rint(x / scale)
    codes += zero_point.astype(np.float32)
    np.clip(codes, limits.min, limits.max, out=codes)
    codes -= zero_point.astype(np.float32)
    return np.asarray(codes * scale, dtype=np.float32)


def activation_grid(low: float, high: float, dtype: DTypeLike, *, symmetric: bool = False) -> tuple[Any, NDArray[Any]]:
    """Scale (float32) and zero point (`dtype`: int8, uint8, int16, uint16) of a range, 0.0 being a code.

    x ≈ scale · (code − zero_point). Symmetric signed codes leave the lowest unused. Where the range is empty, scale 1
    and zero point 0.
    """
    limits = np.iinfo(np.dtype(dtype))
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    bottom = -limits.max if symmetric and limits.min else limits.min
    scale = (high - low) / (limits.max - bottom)
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1), np.zeros((), dtype)
    zero_point = np.rint((bottom + limits.max) / 2 if symmetric else bottom - low / scale)
    return np.float32(scale), np.asarray(zero_point).astype(dtype)
