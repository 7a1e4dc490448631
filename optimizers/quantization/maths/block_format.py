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
int8 is double quantization (QLoRA, Dettmers et al. 2023): a scale is a whole number, which is stored, of units; codes
are chosen after that, and a Cast and a Mul are folded. The unit is a 127th of the largest scale of an output, in
float32, or with `unit_size` of so many weights, in float16. Offsets follow from what code 0 stands for, the minimum,
a whole number of units of its own: with units for 256 weights these are ggml's K-quants.

onnxruntime's CPU kernel reads fields of 2, 4 and 8 bits, those of 2 bits only in blocks of 32 or more (smaller ones it
expands on every call). Codes of other widths are stored in planes: a code of 6 bits as its upper 4 and its lower 2,
each packed. Nodes that the runtime folds put them into the upper bits of the next wider field, whose scale is so many
times smaller. So they cost their own size in the file and that of the field in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Codes, Floats

ZeroPoints = Literal["none", "integer", "float"]
ScaleType = Literal["float32", "float16", "int8"]
LARGEST_MULTIPLIER = 127
SMALLEST_HALF = np.float16(2.0**-24)


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
    unit_size: int = 0
    """Weights that share the unit of int8 scales; 0: a whole output."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if not 16 <= self.block_size <= 256 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two from 16 to 256, not {self.block_size}")
        if self.zero_points not in get_args(ZeroPoints):
            raise ValueError(f"zero_points must be one of {', '.join(get_args(ZeroPoints))}, not {self.zero_points!r}")
        if self.scale_type not in get_args(ScaleType):
            raise ValueError(f"scale_type must be one of {', '.join(get_args(ScaleType))}, not {self.scale_type!r}")
        if self.unit_size and (self.scale_type != "int8" or self.unit_size % self.block_size):
            raise ValueError(f"unit_size {self.unit_size} is for scales of type int8 and a multiple of block_size")
        if self.scale_type == "int8" and self.zero_points == "float" and not self.unit_size:
            raise ValueError("float zero points with scales of type int8 need a unit_size, such as 256")

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
        """Bits that a code takes in the kernel: 2, 4 or 8."""
        return next(width for width in ((2, 4, 8) if self.block_size >= 32 else (4, 8)) if width >= self.bits)

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(width, position in the field) of the planes that codes are stored in; none where codes fill their field."""
        if self.bits == self.field:
            return ()
        result, end = [], self.field
        for width in (4, 2, 1):
            if self.bits & width:
                end -= width
                result.append((width, end))
        return tuple(result)

    @property
    def shrink(self) -> int:
        """How many times smaller the kernel's scales are."""
        return 1 << (self.field - self.bits)

    def bits_per_weight(self) -> float:
        """Storage: codes, one scale a block, and the zero point or offset; without the units of whole outputs."""
        number = {"float32": 32, "float16": 16, "int8": 8}[self.scale_type]
        zero_point = {"none": 0, "integer": self.field, "float": number}[self.zero_points]
        units = (2 if self.zero_points == "float" else 1) * 16 / self.unit_size if self.unit_size else 0
        return self.bits + (number + zero_point) / self.block_size + units

    def block_count(self, features: int) -> int:
        """Blocks of one output; the last may be padded."""
        return -(-features // self.block_size)


class Levels(NamedTuple):
    """Numbers that are whole multiples of units, exactly."""

    multipliers: NDArray[np.int8]
    """[outputs, units, blocks that share one]; with one unit an output [outputs, blocks]."""
    units: NDArray[Any]
    """[outputs, units, 1] float16; [outputs, 1] float32."""

    def product(self) -> Floats:
        """[outputs, blocks]"""
        values = self.multipliers * self.units.astype(np.float32)
        return np.asarray(values.reshape(len(values), -1), dtype=np.float32)


@dataclass(frozen=True)
class QuantizedBlocks:
    """A quantized matrix [features, outputs], not yet packed."""

    codes: Codes
    """[outputs, blocks, block_size], one code a byte. Those of padding dequantize to 0 where the kind can."""
    scales: Floats
    """[outputs, blocks]; 0 for a block of zeros, negative where the weight of largest magnitude is positive (none)."""
    zero_points: Floats
    """[outputs, blocks]; whole numbers unless they are of the kind `float`."""
    format: BlockFormat
    features: int
    levels: Levels | None = None
    """The scales, where they are of type int8."""
    minima: Levels | None = None
    """What code 0 stands for, where scales are of type int8 and zero points floats."""

    def dequantize(self) -> Floats:
        """[features, outputs] float32."""
        values = self.codes.astype(np.float32)
        if self.minima is None:
            values -= self.zero_points[..., None]
            values *= self.scales[..., None]
        else:
            values *= self.scales[..., None]
            values += self.minima.product()[..., None]
        return np.ascontiguousarray(values.reshape(len(values), -1)[:, : self.features].T)

    def matmul_nbits(self) -> list[NDArray[Any]]:
        """The operands of com.microsoft.MatMulNBits, all but the activation, as they are stored.

        codes      [outputs, blocks, block_size · field / 8] uint8, or their planes: see `split_planes`
        scales     [outputs, blocks] in the format's scale_type, still `shrink` times as large as the kernel's; of type
                   int8 two operands, to be multiplied: those of `Levels`
        then for integer zero points [outputs, ⌈blocks · field / 8⌉] uint8; for float ones, which are no operand of the
        kernel (see the module's docstring), offsets [blocks, outputs] or the two `Levels` of the minima.
        """
        format = self.format
        codes = pack(self.codes << (format.field - format.bits), format.field)
        operands: list[NDArray[Any]] = split_planes(codes, format) if format.planes else [codes]
        if self.levels is not None:
            operands += self.levels
        else:
            operands.append(self.scales.astype(format.scale_type))
        if format.zero_points == "integer":
            operands.append(pack(self.zero_points * np.float32(format.shrink), format.field))
        elif self.minima is not None:
            operands += self.minima
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


def multipliers(numbers: Floats, format: BlockFormat, *, up: bool = False) -> Levels:
    """Numbers [outputs, blocks] as nearest int8 multiples of 127ths of the largest magnitude among those of one unit.

    up: not below in magnitude, so that weights which the largest code just reaches are not clipped.
    """
    if format.unit_size:
        numbers = numbers.reshape(len(numbers), -1, format.unit_size // format.block_size)
    units = np.asarray(np.abs(numbers).max(axis=-1, keepdims=True) / np.float32(LARGEST_MULTIPLIER), dtype=np.float32)
    if format.unit_size:
        with np.errstate(over="ignore"):  # whoever asks looks at the products
            units = np.where(units > 0, np.maximum(units.astype(np.float16), SMALLEST_HALF), np.float16(0))
    exact = np.divide(numbers, units, out=np.zeros_like(numbers), where=units != 0)
    if up:  # what is a whole number but for float32 rounding stays the same
        exact = np.copysign(np.ceil(np.abs(exact) - np.float32(1e-3)), exact)
    whole = np.clip(np.rint(exact), -LARGEST_MULTIPLIER, LARGEST_MULTIPLIER)
    return Levels(whole.astype(np.int8), units)


def joined(parts: Sequence[Levels]) -> Levels | None:
    """Those of slabs of outputs, one above the other; None of none."""
    return Levels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))) if parts else None


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


def split_planes(codes: Codes, format: BlockFormat) -> list[NDArray[Any]]:
    """Packed codes [outputs, blocks, n] as planes [outputs, blocks · n / share, 1], share = field / width codes a byte.

    Byte i of a plane holds bits of the bytes share · i + j, j = 0 … share − 1, shifted by width · j; so that
    ((byte >> width · j) & mask) << position, all j side by side, are these bytes again: `join_planes`.
    """
    planes = []
    for width, position in format.planes:
        parts = (codes >> position & mask(width, format.field)).reshape(len(codes), -1, format.field // width)
        shifts = np.arange(parts.shape[-1], dtype=np.uint8) * np.uint8(width)
        planes.append(np.bitwise_or.reduce(parts << shifts, axis=-1, keepdims=True))
    return planes


def join_planes(planes: Sequence[Codes], format: BlockFormat) -> Codes:
    """The inverse of `split_planes`, as the graph computes it: [outputs, bytes of all its blocks]."""
    codes: Codes = np.zeros((), np.uint8)
    for plane, (width, position) in zip(planes, format.planes, strict=True):
        shifts = np.arange(format.field // width, dtype=np.uint8) * np.uint8(width)
        parts = (plane >> shifts & mask(width, format.field)).reshape(len(plane), -1)
        codes = codes | parts << np.uint8(position)
    return codes


def mask(width: int, field: int) -> np.uint8:
    """The lowest `width` bits of every field of a byte."""
    return np.uint8(((1 << width) - 1) * (0xFF // ((1 << field) - 1)))


def unpack(packed: Codes, field: int, count: int) -> Codes:
    """The inverse of `pack`: the first `count` codes along the last axis."""
    places = [(packed >> (field * place)) & ((1 << field) - 1) for place in range(8 // field)]
    codes = np.stack(places, axis=-1).reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(codes[..., :count])
