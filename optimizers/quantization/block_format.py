"""Block quantization: short runs of weights, along the inputs of a product, that share a scale and a zero point.

    weight ≈ scale · (code − zero_point),   code in 0 … 2^bits − 1

Three kinds of zero point:

none      symmetric: the zero point is 2^(bits−1). Up to 7 bits the weight of largest magnitude, with its sign, gets
          code 0, as in GGUF's Q4_0; 8-bit codes span ±127, as in Q8_0. Tensors of either are found again exactly.
integer   asymmetric: the zero point is itself a code, so 0.0 is always exact.
float     asymmetric with any zero point: HQQ's, or a Q4_1 tensor's minimum, which is found again. Stored as the offset
          of each block, scale · (2^(bits−1) − zero point): a symmetric kernel multiplies the codes, and a small product
          adds the offsets times the sum of the inputs in each block. (The kernel's own float zero points make it expand
          the weights on every call.)

Scales and offsets are stored in float32 or float16. With float16 they are rounded before codes are chosen, and a Cast
that the runtime folds while it loads the graph widens them. With all graph optimizations off (nobody's default)
onnxruntime 1.31 reads scales that are not constants wrongly at accuracy level 4.
int8 is double quantization (QLoRA, Dettmers et al. 2023): a scale is a whole number, which is stored, of 127ths of its
output's largest one; codes are chosen after that, and a Cast and a Mul are folded.

onnxruntime's CPU kernel reads fields of 2, 4 and 8 bits; codes of other widths are kept in the next wider field, where
they cost its size but keep their own values (a K-quant's 6 bits in 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
ZeroPoints = Literal["none", "integer", "float"]
ScaleType = Literal["float32", "float16", "int8"]
LARGEST_MULTIPLIER = 127


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is cut and coded. Raises ValueError for what no runtime kernel takes."""

    bits: int = 8
    """2 … 8"""
    block_size: int = 64
    """16, 32, … 256"""
    zero_points: ZeroPoints = "none"
    scale_type: ScaleType = "float32"
    """How scales and offsets are stored."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if not 16 <= self.block_size <= 256 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two from 16 to 256, not {self.block_size}")
        if self.zero_points not in get_args(ZeroPoints):
            raise ValueError(f"zero_points must be one of {', '.join(get_args(ZeroPoints))}, not {self.zero_points!r}")
        if self.scale_type not in get_args(ScaleType):
            raise ValueError(f"scale_type must be one of {', '.join(get_args(ScaleType))}, not {self.scale_type!r}")
        if self.scale_type == "int8" and self.zero_points == "float":
            raise ValueError("float zero points need scales of type float32 or float16, not int8")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def field(self) -> int:
        """Bits that a stored code takes: 2, 4 or 8."""
        return next(width for width in (2, 4, 8) if width >= self.bits)

    def bits_per_weight(self) -> float:
        """Storage: codes, one scale a block, and the zero point or offset; of int8 not the number for each output."""
        number = {"float32": 32, "float16": 16, "int8": 8}[self.scale_type]
        zero_point = {"none": 0, "integer": self.field, "float": number}[self.zero_points]
        return self.field + (number + zero_point) / self.block_size

    def block_count(self, features: int) -> int:
        """Blocks of one output; the last may be padded."""
        return -(-features // self.block_size)


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix [features, outputs], not yet packed."""

    codes: Codes
    """[outputs, blocks, block_size], one code a byte. Those of padding dequantize to 0 where the kind can."""
    scales: Floats
    """[outputs, blocks]; 0 for a block of zeros, negative where the weight of largest magnitude is positive (none)."""
    zero_points: Floats
    """[outputs, blocks]; whole numbers unless they are of the kind `float`."""
    format: BlockFormat
    features: int

    def dequantize(self) -> Floats:
        """[features, outputs] float32."""
        values = self.codes.astype(np.float32)
        values -= self.zero_points[..., None]
        values *= self.scales[..., None]
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, : self.features].T)

    def matmul_nbits(self) -> list[NDArray[Any]]:
        """The operands of com.microsoft.MatMulNBits, all but the activation.

        Codes [outputs, blocks, block_size · field / 8] uint8, scales [outputs, blocks] in the format's scale_type and,
        unless symmetric, zero points [outputs, ⌈blocks · field / 8⌉] uint8. Of the kind `float` the third is no operand
        of the kernel: offsets [blocks, outputs], see the module's docstring. Scales of type int8 are two operands, to
        be multiplied: [outputs, blocks] int8 and [outputs, 1] float32.
        """
        format, codes = self.format, self.codes
        if format.zero_points != "integer":  # the kernel's own zero point is that of the whole field
            codes = np.add(codes, (1 << (format.field - 1)) - format.middle, dtype=np.uint8)
        scales: list[NDArray[Any]]
        if format.scale_type == "int8":
            scales = list(multipliers(self.scales))
        else:
            scales = [self.scales.astype(format.scale_type)]
        operands: list[NDArray[Any]] = [pack(codes, format.field), *scales]
        if format.zero_points == "integer":
            operands.append(pack(self.zero_points, format.field))
        elif format.zero_points == "float":
            offsets = (np.float32(format.middle) - self.zero_points) * self.scales
            operands.append(np.ascontiguousarray(offsets.T.astype(format.scale_type)))
        return operands

    def dequantize_linear(self) -> list[NDArray[Any]]:
        """The operands of DequantizeLinear with axis 0 and `block_size`, one code a byte.

        Codes [features, outputs], scales [blocks, outputs] and, unless symmetric, zero points [blocks, outputs]: uint8
        with zero points, int8 without. ValueError for float zero points, which it does not take.
        """
        format = self.format
        if format.zero_points == "float":
            raise ValueError("DequantizeLinear takes no float zero_points")
        codes = self.codes.reshape(len(self.codes), -1)[:, : self.features].T
        scales = np.ascontiguousarray(self.scales.T)
        if format.zero_points == "none":
            return [np.ascontiguousarray(codes.astype(np.int16) - format.middle).astype(np.int8), scales]
        return [np.ascontiguousarray(codes), scales, np.ascontiguousarray(self.zero_points.T).astype(np.uint8)]


def multipliers(scales: Floats, *, up: bool = False) -> tuple[NDArray[np.int8], Floats]:
    """Scales [rows, blocks] as nearest int8 multiples of 127ths of each row's largest magnitude, and these [rows, 1].

    up: not below in magnitude, so that weights which the largest code just reaches are not clipped. Scales that are
    such products already are found again.
    """
    unit = np.asarray(np.abs(scales).max(axis=1, keepdims=True) / np.float32(LARGEST_MULTIPLIER), dtype=np.float32)
    exact = np.divide(scales, unit, out=np.zeros_like(scales), where=unit != 0)
    if up:  # what is a whole number but for float32 rounding stays the same
        exact = np.copysign(np.ceil(np.abs(exact) - np.float32(1e-3)), exact)
    return np.rint(exact).astype(np.int8), unit


def split_columns(weight: Floats, block_size: int) -> Floats:
    """[features, outputs] -> [outputs, blocks, block_size], the last block padded with zeros."""
    rows = np.ascontiguousarray(weight.T, dtype=np.float32)
    padding = -rows.shape[1] % block_size
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    return rows.reshape(len(rows), -1, block_size)


def pack(values: NDArray[Any], field: int) -> Codes:
    """Codes [..., n] to bytes [..., ⌈n · field / 8⌉], the first code in the lowest bits."""
    codes = values.astype(np.uint8)
    per_byte = 8 // field
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], padding), np.uint8)], axis=-1)
    packed: Codes = codes[..., ::per_byte]
    for place in range(1, per_byte):
        packed = np.bitwise_or(packed, codes[..., place::per_byte] << (field * place), dtype=np.uint8)
    return np.ascontiguousarray(packed)


def unpack(packed: Codes, field: int, count: int) -> Codes:
    """The inverse of `pack`: the first `count` codes along the last axis."""
    places = [(packed >> (field * place)) & ((1 << field) - 1) for place in range(8 // field)]
    codes = np.stack(places, axis=-1).reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(codes[..., :count])
