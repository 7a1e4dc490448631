"""LLM.int8() (Dettmers et al. 2022): a few input channels stay in floating point, the others are multiplied in int8.

    x · W = x[outliers] · W[outliers] + dequantize(int8(x[others]) · int8(W[others]))

Outliers live in the same few channels whatever the token, so that the split can be fixed beforehand.
"""

from __future__ import annotations

import numpy as np

from onnxpress.arrays import Floats, Indices


def fewest_outliers(peaks: Floats, weight: Floats, energy: float, max_error: float, bits: int = 8) -> Indices:
    """The fewest channels, loudest first, without which one range for all tokens is fine enough.

    Rounding all other channels to steps of 2 · peak / (2^bits − 2), `peak` being the loudest of those left, adds
    an error of step² / 12 to each input: to the product, step² / 12 · Σ ‖W_k‖².

    Args:
        peaks: max|x|, [features].
        weight: [features, outputs].
        energy: E‖x W‖², tr(Wᵀ H W).
        max_error: of that energy, at most.
    """
    order = np.argsort(-peaks, kind="stable")
    loudest = np.append(peaks[order].astype(np.float64), 0)
    squares = np.einsum("ij,ij->i", weight, weight, dtype=np.float64)[order]
    left = np.append(np.cumsum(squares[::-1])[::-1], 0)
    errors = (2 * loudest / ((1 << bits) - 2)) ** 2 / 12 * left
    return np.sort(order[: int(np.argmax(errors <= max_error * energy))])
