"""Exact rescaling of channels, so that they quantize better: (x / s) · (s W) = x · W.

1 / s is folded into whatever computes x (a norm's gain, the weights of the product before), s into the rows of W.

smoothing_factors   SmoothQuant (Xiao et al. 2023): outlier channels move from activations into weights
equalizing_factors  cross-layer equalization (Nagel et al. 2019): two consecutive weights share their range
awq                 AWQ (Lin et al. 2023): channels that matter get finer steps within their block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxpress.arrays import Doubles, Floats
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks
from onnxpress.optimizers.quantization.maths.least_squares import round_to_nearest

FLOOR = 1e-4
"""Channels quieter than this fraction of the loudest count as that loud: their s would only amplify rounding."""
STRENGTHS = tuple(np.linspace(0, 1, 21))


def smoothing_factors(activation_peaks: Floats, weight_peaks: Floats, strength: float) -> Floats:
    """s = max|x|^strength / max|W|^(1 − strength), [channels] > 0 with geometric mean 1; the peaks are per channel."""
    activation, weight = (
        np.maximum(peaks, FLOOR * peaks.max() or 1).astype(np.float64) for peaks in (activation_peaks, weight_peaks)
    )
    return _centred(strength * np.log(activation) - (1 - strength) * np.log(weight))


def equalizing_factors(first_peaks: Floats, second_peaks: Floats) -> Floats:
    """s such that W1 / s (columns) and s W2 (rows) reach equally far in each channel between them.

    Exact where what lies between commutes with positive scales: nothing, or ReLU.
    """
    return smoothing_factors(first_peaks, second_peaks, 0.5)


@dataclass(frozen=True)
class AwqScaling:
    """The best factors of a search, and what rescaling by them gains."""

    factors: Floats
    """s [features] with geometric mean 1; ones where nothing gains."""
    strength: float
    error: float
    """tr(Eᵀ H E) / tr(Wᵀ H W) over all products, E being the error of the quantized s W, divided by s."""
    plain_error: float
    """The same with s = 1."""


def awq(
    weights: Sequence[Floats],
    magnitudes: Floats,
    gram: Doubles,
    format: BlockFormat,
    *,
    quantize: Callable[[Floats, BlockFormat], QuantizedBlocks] = round_to_nearest,
    strengths: Sequence[float] = STRENGTHS,
) -> AwqScaling:
    """Search s = magnitudes^strength for the least error of products that read the same activation.

    Args:
        weights: [features, outputs] float32 each.
        magnitudes: E|x| of each channel, [features].
        gram: E[x xᵀ], [features, features].
        quantize: how codes are found while searching.
    """
    hessian = gram.astype(np.float32)
    energy = sum(float(np.vdot(weight, hessian @ weight)) for weight in weights) or 1.0
    logarithm = np.log(np.maximum(magnitudes, FLOOR * magnitudes.max() or 1).astype(np.float64))

    def error(factors: Floats) -> float:
        total = 0.0
        for weight in weights:
            difference = quantize(factors[:, None] * weight, format).dequantize()
            difference /= factors[:, None]
            difference -= weight
            total += float(np.vdot(difference, hessian @ difference))
        return total / energy

    plain = error(np.ones(len(magnitudes), np.float32))
    best = AwqScaling(np.ones(len(magnitudes), np.float32), 0.0, plain, plain)
    for strength in strengths:
        if strength == 0:
            continue
        factors = _centred(strength * logarithm)
        found = error(factors)
        if found < best.error:
            best = AwqScaling(factors, float(strength), found, plain)
    return best


def _centred(logarithm: Doubles) -> Floats:
    """Geometric mean 1: what s does not have to change stays as it is."""
    return np.asarray(np.exp(logarithm - logarithm.mean()), dtype=np.float32)
