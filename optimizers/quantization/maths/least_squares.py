"""Rounding to nearest, and to the grids with the least (weighted) squared error. No sample inputs needed.

Weighting each input channel by how loud it is makes the error that of the product's output, if channels did not
correlate: Σ_k E[x_k²] (w_k − ŵ_k)², which is what llama.cpp's importance matrices hold. GPTQ takes correlations into
account, too.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Floats
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks, split_columns
from onnxpress.optimizers.quantization.maths.grids import (
    Grid,
    best_grid,
    better,
    encode,
    full_range,
    gain,
    quantize,
    rounded,
    sums,
)

SHRINK = (1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Ranges tried beside the full one: clipping the largest weights a little rounds all others finer."""
ROUNDS = 4
"""Rounds of rounding to the best grid so far and fitting it to the new codes."""


def round_to_nearest(weight: Floats, format: BlockFormat) -> QuantizedBlocks:
    """Codes nearest to [features, outputs], on grids that reach each block's largest weights."""
    return quantize(weight, format, lambda blocks: full_range(blocks, format))


def fit_least_squares(weight: Floats, format: BlockFormat, importance: Floats | None = None) -> QuantizedBlocks:
    """Grids with the least squared error: several ranges are tried, the best is refined by alternation.

    Never worse than rounding to nearest, block by block.

    Args:
        weight: [features, outputs] float32, finite.
        importance: [features] ≥ 0, such as E[x²] of each input channel; none: all weigh the same.
    """
    weighing = block_importance(np.ones(len(weight), np.float32) if importance is None else importance, format)
    return quantize(weight, format, lambda blocks: least_squares_grid(blocks, format, weighing))


def block_importance(importance: Floats, format: BlockFormat) -> Floats:
    """[features] -> [blocks, block_size] of mean 1, lest very loud channels overflow; 0 for padding."""
    if not (np.isfinite(importance).all() and importance.min() >= 0):
        raise ValueError("importance must be finite and not negative")
    mean = float(np.mean(importance, dtype=np.float64))
    scaled = (importance / mean if mean > 0 else np.ones_like(importance)).astype(np.float32)
    blocks: Floats = split_columns(scaled[:, None], format.block_size)[0]
    return blocks


def least_squares_grid(weights: Floats, format: BlockFormat, importance: Floats) -> Grid:
    """[..., blocks, block_size] -> grids [..., blocks]; `importance` broadcasts against the weights."""
    start = full_range(weights, format)
    first = sums(weights, encode(weights, start, format), importance)
    best, most = start, gain(first, start)
    for grid in (start, *(_shrunk(start, factor, format) for factor in SHRINK)):
        best, most = _fitted(weights, grid, format, importance, best, most)
    for _ in range(ROUNDS):
        best, most = _fitted(weights, best, format, importance, best, most)
    return best


def _fitted(
    weights: Floats, grid: Grid, format: BlockFormat, importance: Floats, best: Grid, most: Floats
) -> tuple[Grid, Floats]:
    """Round to `grid`, fit the grid to these codes, and keep it where it beats `best`."""
    found = sums(weights, encode(weights, grid, format), importance)
    fitted = best_grid(found, grid, format)
    return better(best, most, fitted, gain(found, fitted))


def _shrunk(grid: Grid, factor: float, format: BlockFormat) -> Grid:
    """The same range about its centre, times `factor`."""
    if format.zero_points == "none":
        return rounded(Grid(grid.scales * np.float32(factor), grid.zero_points), format)
    centre = np.float32(format.top / 2)
    zero_points = centre + (grid.zero_points - centre) / np.float32(factor)
    return rounded(Grid(grid.scales * np.float32(factor), zero_points), format)
