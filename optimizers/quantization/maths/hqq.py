"""Half-quadratic quantization: grids that fit most weights well and leave a few outliers badly off. No sample inputs.

Badri & Shaji 2023 minimise Σ |w − ŵ|^p with p < 1 by splitting: the errors e are drawn towards few large ones,
argmin |e|^p + β/2 (e − (w − ŵ))², which is nearly a soft threshold, and the grid is fitted to w − e by least squares.

Two departures. Errors are measured in steps of the block's grid, so that β means the same for weights of any size: with
the published β = 10 on raw weights of 0.02, every e is 0. And where the kernel wants whole zero points, or none, the
scale is fitted as well, since there is little else to fit.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Floats
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks
from onnxpress.optimizers.quantization.maths.grids import (
    Grid,
    best_grid,
    better,
    decode,
    encode,
    full_range,
    quantize,
    sums,
)
from onnxpress.optimizers.quantization.maths.least_squares import block_importance

EXPONENT = 0.7
BETA, GROWTH = 10.0, 1.01
ROUNDS = 20


def hqq(weight: Floats, format: BlockFormat, *, exponent: float = EXPONENT, rounds: int = ROUNDS) -> QuantizedBlocks:
    """Quantize [features, outputs] with a lower Σ |w − ŵ|^exponent than rounding to nearest, or the same."""
    if not 0 < exponent <= 1:
        raise ValueError(f"exponent must lie in 0 … 1, not {exponent}")
    counted = block_importance(np.ones(len(weight), np.float32), format)
    return quantize(weight, format, lambda blocks: hqq_grid(blocks, format, counted, exponent, rounds))


def hqq_grid(weights: Floats, format: BlockFormat, counted: Floats, exponent: float, rounds: int) -> Grid:
    """[..., blocks, block_size] -> each block's best grid of all rounds; `counted` is 0 for padding."""
    grid = full_range(weights, format)
    size: Floats = np.where(grid.scales == 0, np.float32(1), np.abs(grid.scales))[..., None]
    codes = encode(weights, grid, format)
    errors = (weights - decode(codes, grid)) / size
    best, least = grid, _objective(errors * counted, exponent)
    beta = BETA
    for _ in range(rounds):
        outliers = _shrink(errors, beta, exponent) * size
        grid = best_grid(sums(weights - outliers, codes, counted), grid, format)
        codes = encode(weights, grid, format)
        errors = (weights - decode(codes, grid)) / size
        best, gained = better(best, -least, grid, -_objective(errors * counted, exponent))
        least = -gained
        beta *= GROWTH
    return best


def _objective(errors: Floats, exponent: float) -> Floats:
    return np.asarray(np.power(np.abs(errors), np.float32(exponent)).sum(axis=-1), dtype=np.float32)


def _shrink(errors: Floats, beta: float, exponent: float) -> Floats:
    """The published approximation of the proximal step of |e|^p."""
    magnitude = np.abs(errors)
    threshold = np.power(magnitude + np.float32(1e-8), np.float32(exponent - 1)) / np.float32(beta)
    return np.copysign(np.maximum(magnitude - threshold, 0), errors)
