"""The grid of a block: scale and zero point, how weights are rounded to it, and the best one for given codes.

For fixed codes c the weighted squared error of a block is quadratic in scale and zero point,

    Σ i (w − s (c − z))² = Σ i w² − gain,   gain = 2 s (A − z B) − s² (C − 2 z D + z² E)

    A = Σ i w c   B = Σ i w   C = Σ i c²   D = Σ i c   E = Σ i

so five sums a block give the best scale for a zero point, s = (A − z B) / (C − 2 z D + z² E), and the best zero point,
z = (A D − B C) / (A E − B D), without going back to the weights. Whatever chooses grids works on these sums.

Arrays are [..., blocks, block_size] for weights and codes, [..., blocks] for grids and sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onnxpress.arrays import Floats
from onnxpress.optimizers.quantization.maths.block_format import (
    SMALLEST_HALF,
    BlockFormat,
    Levels,
    QuantizedBlocks,
    joined,
    multipliers,
    split_columns,
)

CHUNK = 1 << 18
"""Weights at a time: temporaries stay within the cache and memory within a few megabytes."""
SMALLEST = np.float32(np.finfo(np.float32).tiny)
"""Scales below have no finite inverse: their blocks become zeros."""


class Grid(NamedTuple):
    """[..., blocks] each."""

    scales: Floats
    zero_points: Floats


class Sums(NamedTuple):
    """A … E of the module's docstring."""

    weight_code: Floats
    weight: Floats
    code_code: Floats
    code: Floats
    importance: Floats


def quantize(weight: Floats, format: BlockFormat, choose: Callable[[Floats], Grid]) -> QuantizedBlocks:
    """Round a matrix to the grids that `choose` finds, a slab of outputs at a time.

    Args:
        weight: [features, outputs] float32, finite.
        choose: [n, blocks, block_size] -> the grids [n, blocks].

    Raises:
        ValueError: a scale is not finite: float16 does not hold it.
    """
    features, outputs = weight.shape
    count = format.block_count(features)
    codes = np.empty((outputs, count, format.block_size), np.uint8)
    grid = Grid(np.empty((outputs, count), np.float32), np.empty((outputs, count), np.float32))
    scales: list[Levels] = []
    minima: list[Levels] = []
    step = max(1, CHUNK // max(1, features))
    for start in range(0, outputs, step):
        slab = slice(start, start + step)
        blocks = split_columns(weight[:, slab], format.block_size)
        chosen = choose(blocks)
        if format.scale_type == "int8":
            scales.append(multipliers(chosen.scales, format, up=format.bits == 8))
            chosen = Grid(scales[-1].product(), chosen.zero_points)
            if format.zero_points == "float":
                minima.append(multipliers(-chosen.zero_points * chosen.scales, format))
                low = minima[-1].product()
                zero_points = np.divide(-low, chosen.scales, out=np.zeros_like(low), where=chosen.scales != 0)
                chosen = Grid(chosen.scales, zero_points)
        grid.scales[slab], grid.zero_points[slab] = chosen
        codes[slab] = encode(blocks, chosen, format)
    if not (np.isfinite(grid.scales).all() and np.isfinite(grid.zero_points).all()):
        raise ValueError(f"scales up to {np.abs(weight).max() / format.middle:g} do not fit in {format.scale_type}")
    return QuantizedBlocks(codes, grid.scales, grid.zero_points, format, features, joined(scales), joined(minima))


def full_range(weights: Floats, format: BlockFormat) -> Grid:
    """The grid that reaches the largest weights; every weight is within half a step of it, or see below.

    Half a step for 8-bit symmetric and for float zero points. A whole step for integer zero points, half for the code
    and half for the zero point, and for symmetric codes of fewer bits, whose outermost code exists on one side only.
    """
    if format.zero_points == "none":
        if format.bits == 8:
            scales = np.abs(weights).max(axis=-1) / np.float32(format.middle - 1)
        else:
            place = np.abs(weights).argmax(axis=-1)[..., None]
            scales = np.take_along_axis(weights, place, axis=-1)[..., 0] / np.float32(-format.middle)
        return rounded(Grid(scales, np.full(scales.shape, format.middle, np.float32)), format)
    return spanning(weights.min(axis=-1), weights.max(axis=-1), format)


def spanning(low: Floats, high: Floats, format: BlockFormat) -> Grid:
    """The asymmetric grid from `low` to `high`."""
    if format.zero_points == "integer":  # the zero point must be a code: the range includes 0
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = high / np.float32(format.top) - low / np.float32(format.top)
    # A constant block has no range; one step of its own size, below it, reaches it.
    scales = rounded_scales(np.where((scales == 0) & (low != 0), low, scales), format)
    zero_points = np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0)
    return rounded(Grid(scales, zero_points), format)


def rounded_scales(scales: Floats, format: BlockFormat) -> Floats:
    """As the format stores them; what is not zero stays so in float16."""
    scales = np.where(np.abs(scales) < SMALLEST, np.float32(0), scales)
    if format.scale_type != "float16":  # int8 looks at a whole row: see `quantize`
        return scales
    with np.errstate(over="ignore"):  # `quantize` refuses infinity
        half = scales.astype(np.float16).astype(np.float32)
    return np.where((half == 0) & (scales != 0), np.copysign(np.float32(SMALLEST_HALF), scales), half)


def rounded(grid: Grid, format: BlockFormat) -> Grid:
    """As the format stores it."""
    scales, zero_points = rounded_scales(grid.scales, format), grid.zero_points
    if format.zero_points == "integer":
        zero_points = np.clip(np.rint(zero_points), 0, format.top)
    elif format.zero_points == "float" and format.scale_type == "float16":
        # What is stored is the offset; it is rounded so that the weight of code 0 keeps its place.
        middle = np.float32(format.middle)
        with np.errstate(over="ignore", invalid="ignore"):  # `quantize` refuses infinity
            offsets = ((middle - zero_points) * scales).astype(np.float16).astype(np.float32)
            zero_points = middle - np.divide(offsets, scales, out=np.zeros_like(scales), where=scales != 0)
    return Grid(scales, zero_points)


def encode(weights: Floats, grid: Grid, format: BlockFormat) -> Floats:
    """The nearest codes, still as float32."""
    scales, zero_points = grid
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes: Floats = weights * inverse[..., None]
    codes += zero_points[..., None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, format.top, out=codes)
    return codes


def decode(codes: Floats, grid: Grid) -> Floats:
    """The weights that codes stand for."""
    values: Floats = codes - grid.zero_points[..., None]
    values *= grid.scales[..., None]
    return values


def sums(weights: Floats, codes: Floats, importance: Floats) -> Sums:
    """A … E; `importance` broadcasts against the weights."""
    weighted = codes * importance
    with np.errstate(over="ignore"):  # absurdly large weights: `gain` counts their grids as no improvement
        return Sums(
            _dot(weights, weighted),
            _dot(weights, importance),
            _dot(codes, weighted),
            _dot(codes, importance),
            np.broadcast_to(importance.sum(axis=-1), weights.shape[:-1]),
        )


def gain(found: Sums, grid: Grid) -> Floats:
    """How much lower the squared error is than with all codes at the zero point; −inf where the sums overflowed."""
    (a, b, c, d, e), (s, z) = found, grid
    with np.errstate(over="ignore", invalid="ignore"):
        value = 2 * s * (a - z * b) - s * s * (c - 2 * z * d + z * z * e)
    return np.where(np.isfinite(value), value, np.float32(-np.inf))


def best_grid(sums: Sums, grid: Grid, format: BlockFormat) -> Grid:
    """The grid with the least weighted squared error for the codes behind `sums`; where none is best, `grid`'s."""
    if format.zero_points == "none":
        return _best_scales(sums, grid, format)
    a, b, c, d, e = sums
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        fitted = (a * d - b * c) / (a * e - b * d)
    exact: Floats = np.where(np.isfinite(fitted), fitted, grid.zero_points)
    if format.zero_points == "float":
        return _best_scales(sums, rounded(Grid(grid.scales, exact), format), format)
    # The gain rises towards the best zero point from either side, so one of the two codes next to it is best.
    below, above = (
        _best_scales(sums, rounded(Grid(grid.scales, side(exact)), format), format) for side in (np.floor, np.ceil)
    )
    return better(below, gain(sums, below), above, gain(sums, above))[0]


def better(one: Grid, one_gain: Floats, other: Grid, other_gain: Floats) -> tuple[Grid, Floats]:
    """Block by block, whichever gains more; a tie keeps `one`."""
    wins = other_gain > one_gain
    picked = Grid(*(np.where(wins, new, old) for new, old in zip(other, one, strict=True)))
    return picked, np.where(wins, other_gain, one_gain)


def _best_scales(found: Sums, grid: Grid, format: BlockFormat) -> Grid:
    (a, b, c, d, e), z = found, grid.zero_points
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = (a - z * b) / (c - 2 * z * d + z * z * e)
    scales = np.where(np.isfinite(scales), scales, grid.scales)
    return rounded(Grid(scales, z), format)


def _dot(one: Floats, other: Floats) -> Floats:
    return np.asarray(np.einsum("...i,...i->...", one, other), dtype=np.float32)
