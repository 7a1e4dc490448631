"""Block quantization: short runs of weights that share a scale and, optionally, a zero point. Pure numpy.

    weight ≈ scale · (code − zero_point),   code in 0 … 2^bits − 1

Three kinds of zero point:

none      symmetric: the zero point is 2^(bits−1). Of 4-bit codes the weight of largest magnitude, with its sign, gets
          code 0, as in GGUF's Q4_0; 8-bit codes span ±127, as in Q8_0. Tensors of either are found again exactly.
integer   asymmetric: the zero point is itself a code, so 0.0 is always exact.
float     asymmetric with the zero point that fits best (HQQ, Badri & Shaji 2023). A Q4_1 tensor is found again to
          rounding. onnxruntime's CPU kernel expands such weights on every call, which is why no CPU recipe uses it.

Error bounds, s being the scale that rounding starts from (largest magnitude / 8 or / 127, or range / (2^bits − 1)):
8-bit symmetric |w − ŵ| ≤ s/2; 4-bit symmetric ≤ s/2, and ≤ s for weights beyond 7.5 s of the other sign, whose code
does not exist; integer zero points ≤ s, half for the code and half for the zero point; float ≤ s/2. The search for
scales and the fit of zero points only ever lower a block's squared error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
ZeroPoints = Literal["none", "integer", "float"]

SHRINK = (0.95, 0.9, 0.85, 0.8, 0.75)
"""Scales tried beside the full range: clipping the largest weights a little rounds all others finer."""
CHUNK = 1 << 20
"""Weights at a time: temporaries stay within the cache and memory within a few megabytes."""


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is cut and coded. Raises ValueError for what no runtime kernel takes."""

    bits: int = 8
    block_size: int = 64
    zero_points: ZeroPoints = "none"
    search: bool = True
    """Try several scales per block and keep the best by squared error; 8 bits gain nothing by it and skip it."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, not {self.bits}")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two and at least 16, not {self.block_size}")
        if self.zero_points not in get_args(ZeroPoints):
            raise ValueError(f"zero_points must be one of {', '.join(get_args(ZeroPoints))}, not {self.zero_points!r}")
        if self.bits == 8 and self.zero_points == "float":
            raise ValueError("8-bit blocks take no float zero_points: no CPU kernel runs them")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def bits_per_weight(self) -> float:
        """Storage: codes, one fp32 scale a block, and the zero point."""
        zero_point = {"none": 0, "integer": self.bits, "float": 32}[self.zero_points]
        return self.bits + (32 + zero_point) / self.block_size


@dataclass(frozen=True)
class Blocks:
    """Quantized blocks, not yet packed."""

    codes: Codes
    """[blocks, block_size] uint8, also for 4 bits."""
    scales: Floats
    """[blocks]; 0 for a block of zeros, negative where the weight of largest magnitude is positive (symmetric)."""
    zero_points: Floats
    """[blocks]; whole numbers unless they were fitted."""

    def dequantize(self) -> Floats:
        """[blocks, block_size]"""
        codes = self.codes.astype(np.float32)
        return np.asarray((codes - self.zero_points[:, None]) * self.scales[:, None], dtype=np.float32)


def quantize_blocks(weights: Floats, format: BlockFormat) -> Blocks:
    """Round to nearest, with the best of several scales for each block.

    Args:
        weights: [blocks, block_size] float32, finite.
    """
    step = max(1, CHUNK // weights.shape[1])
    parts = [_quantize(weights[start : start + step], format) for start in range(0, len(weights), step)]
    if len(parts) == 1:
        return parts[0]
    return Blocks(
        np.concatenate([part.codes for part in parts]) if parts else np.zeros(weights.shape, np.uint8),
        np.concatenate([part.scales for part in parts]) if parts else np.zeros(0, np.float32),
        np.concatenate([part.zero_points for part in parts]) if parts else np.zeros(0, np.float32),
    )


def _quantize(weights: Floats, format: BlockFormat) -> Blocks:
    scales, zero_points = _full_range(weights, format)
    best = _round(weights, scales, zero_points, format)
    if format.search and format.bits < 8:
        error = _squared_error(weights, best)
        for factor in SHRINK:
            candidate = _round(weights, np.float32(factor) * scales, zero_points, format)
            candidate = _round(weights, _fit_scales(weights, candidate), zero_points, format)
            best, error = _better(weights, best, error, candidate)
        if format.zero_points == "float":
            best, error = _better(weights, best, error, _fit_zero_points(weights, best, format))
    return best


def _full_range(weights: Floats, format: BlockFormat) -> tuple[Floats, Floats]:
    """Scales and zero points that reach the largest weights."""
    if format.zero_points == "none":
        if format.bits == 8:
            scales = np.abs(weights).max(axis=1) / np.float32(format.middle - 1)
            return scales, np.full(len(weights), format.middle, np.float32)
        rows = np.arange(len(weights))
        largest = weights[rows, np.abs(weights).argmax(axis=1)]
        return largest / np.float32(-format.middle), np.full(len(weights), format.middle, np.float32)
    low, high = weights.min(axis=1), weights.max(axis=1)
    if format.zero_points == "integer":  # the zero point must be a code: the range includes 0
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scales = (high - low) / np.float32(format.top)
    # A constant block has no range; one step of its own size, below it, reaches it.
    scales = np.where((scales == 0) & (low != 0), low, scales)
    zero_points = np.divide(-low, scales, out=np.zeros_like(low), where=scales != 0)
    return scales, np.rint(zero_points) if format.zero_points == "integer" else zero_points


def _round(weights: Floats, scales: Floats, zero_points: Floats, format: BlockFormat) -> Blocks:
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = weights * inverse[:, None]
    codes += zero_points[:, None]
    np.rint(codes, out=codes)
    np.clip(codes, 0, format.top, out=codes)
    return Blocks(codes.astype(np.uint8), scales, zero_points)


def _squared_error(weights: Floats, blocks: Blocks) -> Floats:
    difference = blocks.dequantize()
    difference -= weights
    return np.asarray(np.einsum("ij,ij->i", difference, difference), dtype=np.float32)


def _fit_scales(weights: Floats, blocks: Blocks) -> Floats:
    """Least squares for the codes as they are: Σ w·c / Σ c², c being code − zero point."""
    centred = blocks.codes - blocks.zero_points[:, None]
    square = np.einsum("ij,ij->i", centred, centred)
    product = np.einsum("ij,ij->i", weights, centred)
    return np.asarray(np.divide(product, square, out=blocks.scales.copy(), where=square > 0), dtype=np.float32)


def _fit_zero_points(weights: Floats, blocks: Blocks, format: BlockFormat, rounds: int = 10) -> Blocks:
    """HQQ's half-quadratic splitting: residuals shrunk towards an l_p norm (p = 0.7), zero points from their mean."""
    beta, exponent = 10.0, 0.7
    inverse = np.divide(1, blocks.scales, out=np.zeros_like(blocks.scales), where=blocks.scales != 0)
    current = blocks
    for _ in range(rounds):
        residual = weights - current.dequantize()
        magnitude = np.abs(residual)
        shrunk = np.sign(residual) * np.maximum(
            magnitude - np.power(magnitude + np.float32(1e-8), exponent - 1) / np.float32(beta), 0
        )
        zero_points = np.mean(current.codes - (weights - shrunk) * inverse[:, None], axis=1, dtype=np.float32)
        current = _round(weights, blocks.scales, np.asarray(zero_points), format)
        beta *= 1.01
    return current


def _better(weights: Floats, best: Blocks, error: Floats, candidate: Blocks) -> tuple[Blocks, Floats]:
    """Block by block, whichever is closer to the weights; a tie keeps what was there."""
    candidate_error = _squared_error(weights, candidate)
    wins = candidate_error < error
    return (
        Blocks(
            np.where(wins[:, None], candidate.codes, best.codes),
            np.where(wins, candidate.scales, best.scales),
            np.where(wins, candidate.zero_points, best.zero_points),
        ),
        np.minimum(error, candidate_error),
    )


def split_rows(weights: Floats, block_size: int) -> Floats:
    """[rows, columns] -> [rows · ⌈columns / block_size⌉, block_size], each row padded with zeros to whole blocks."""
    padding = -weights.shape[1] % block_size
    if padding:
        weights = np.pad(weights, ((0, 0), (0, padding)))
    return np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, block_size)


def pack(values: NDArray[Any], bits: int) -> Codes:
    """Codes [..., n] to bytes [..., ⌈n · bits / 8⌉]; two 4-bit codes a byte, the first in the low half."""
    codes = values.astype(np.uint8)
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(codes[..., 0::2] | (codes[..., 1::2] << 4), dtype=np.uint8)


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """The inverse of `pack`: the first `count` codes along the last axis."""
    if bits == 8:
        return packed[..., :count]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return np.asarray(codes[..., :count], dtype=np.uint8)


def quantize_matrix(weights: Floats, format: BlockFormat) -> list[NDArray[Any]]:
    """A matrix in MatMulNBits' layout.

    Args:
        weights: [N, K] float32, a row per output: blocks run along the inputs.

    Returns:
        codes [N, blocks, block_size · bits / 8] uint8, scales [N, blocks] float32 and, unless symmetric, zero points:
        [N, ⌈blocks · bits / 8⌉] uint8, or [N, blocks] float32 if fitted.
    """
    rows = len(weights)
    blocks = quantize_blocks(split_rows(weights, format.block_size), format)
    result: list[NDArray[Any]] = [
        pack(blocks.codes, format.bits).reshape(rows, -1, format.block_size * format.bits // 8),
        blocks.scales.reshape(rows, -1),
    ]
    if format.zero_points == "integer":
        result.append(pack(blocks.zero_points.reshape(rows, -1), format.bits))
    elif format.zero_points == "float":
        result.append(blocks.zero_points.reshape(rows, -1))
    return result
