"""Integer weights with one scale per output channel, for onnxruntime's integer products. Pure numpy.

    weight[:, n] ≈ scale[n] · (code[:, n] − zero_point[n])

int8    symmetric in −127 … 127, zero point 0: |w − ŵ| ≤ scale / 2, scale = largest magnitude / 127.
uint8   asymmetric in 0 … 255: |w − ŵ| ≤ scale, half for the code and half for the zero point, scale = range / 255.

x86 without VNNI multiplies uint8 activations with int8 weights in saturating 16-bit arithmetic and silently destroys
the result; uint8 weights are right everywhere.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

WeightType = Literal["uint8", "int8"]


def quantize_channels(
    weights: NDArray[np.float32], weight_type: WeightType, least_scales: NDArray[np.float32] | float = 0.0
) -> list[NDArray[Any]]:
    """Quantize the columns of a matrix, each with its own scale.

    Args:
        weights: [K, N] float32, finite.
        least_scales: [N], or one for all; smaller scales are raised to these.

    Returns:
        codes [K, N], scales [N] float32, zero points [N]; codes and zero points in `weight_type`. A column of zeros
        gets scale 1.
    """
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    if weight_type == "int8":
        scales = np.maximum(-low, high) / np.float32(127)
        zero_points = np.zeros(weights.shape[1], np.float32)
        bottom, top = -127, 127
    else:
        scales = (high - low) / np.float32(255)
        bottom, top = 0, 255
    scales = np.maximum(scales, least_scales)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    if weight_type == "uint8":
        zero_points = np.rint(-low / scales)
    codes = weights / scales
    codes += zero_points
    np.rint(codes, out=codes)
    np.clip(codes, bottom, top, out=codes)
    return [codes.astype(weight_type), scales, zero_points.astype(weight_type)]


def quantize_tensor(
    weights: NDArray[np.float32], weight_type: WeightType, least_scale: float = 0.0
) -> list[NDArray[Any]]:
    """Quantize an array of any shape with one scale: codes in its shape, scale and zero point []."""
    codes, scales, zero_points = quantize_channels(weights.reshape(-1, 1), weight_type, least_scale)
    return [codes.reshape(weights.shape), scales.reshape(()), zero_points.reshape(())]


def dequantize_channels(
    codes: NDArray[Any], scales: NDArray[np.float32], zero_points: NDArray[Any]
) -> NDArray[np.float32]:
    """[K, N] float32"""
    return np.asarray((codes.astype(np.float32) - zero_points.astype(np.float32)) * scales, dtype=np.float32)


def quantize_bias(
    bias: NDArray[np.float32], activation_scale: float, weight_scales: NDArray[np.float32]
) -> NDArray[np.int32]:
    """[N] int32 with scale activation_scale · weight_scales and zero point 0, which an integer product adds up to.

    Raises:
        ValueError: a bias is too large for its scale; see `least_weight_scales`.
    """
    codes = np.rint(bias.astype(np.float64) / (np.float64(activation_scale) * weight_scales.astype(np.float64)))
    if codes.size and np.abs(codes).max() > np.iinfo(np.int32).max:
        worst = int(np.abs(codes).argmax())
        raise ValueError(f"bias {bias[worst]:g} of channel {worst} does not fit in 32 bits at its scale")
    return codes.astype(np.int32)


def least_weight_scales(bias: NDArray[np.float32], activation_scale: float) -> NDArray[np.float32]:
    """[N]: the scales that weights must at least have, so that their biases fit in 32 bits with a bit to spare."""
    return (np.abs(bias.astype(np.float64)) / (activation_scale * (1 << 30))).astype(np.float32)
