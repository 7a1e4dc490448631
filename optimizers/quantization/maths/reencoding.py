"""Exact re-encoding of stored codes: the codes and steps of weights from their values alone.

A K-quant of ggml is a super-block of 256 weights, cut into blocks of 16 or 32, each with a whole number for its step
and in some kinds one for its minimum:

    w = d · s_b · q − e · m_b         d, e float16 for the super-block; s_b, m_b of 4 to 8 bits; q the codes

All of this fits into the 24 bits of a float32, so that a weight is that number and not just near it. Seen as integers,
a block's step is a common divisor of its weights (with minima: of their differences), and d and e are common divisors
of the steps and of the minima of a super-block. Which divisor it was in the file does not matter: any that keeps codes
and multipliers within their range stands for the same weights.

Arrays are [super-blocks, blocks, block_size] for weights, [super-blocks, blocks] for steps and minima.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from onnxpress.arrays import Booleans, Floats, Integers
from onnxpress.optimizers.quantization.maths.block_format import (
    LARGEST_MULTIPLIER,
    BlockFormat,
    Levels,
    QuantizedBlocks,
    split_columns,
)

CHUNK = 1 << 20
"""Weights at a time."""
SPARE_BITS = 4
"""Below the lowest bit of any weight: d may be a fraction of it, where all codes of a super-block are even."""
MOST_PARTS = 8
"""Parts of the largest possible unit that are tried where minima must fit, too."""
EXACT_BITS = 52
"""Weights of one super-block that are further apart have no exact codes that are worth having."""


class _Found(NamedTuple):
    """Integers, times 2^exponents."""

    codes: Integers
    """0 … top."""
    steps: Integers
    units: Integers
    """[super-blocks], of which steps are multiples; without units the steps themselves."""
    minima: Integers
    """What code 0 stands for; 0 in symmetric formats, where it is the middle code that stands for 0."""
    minimum_units: Integers
    """[super-blocks]"""
    exponents: Integers
    """[super-blocks]"""


def find_exact_codes(weight: Floats, format: BlockFormat) -> QuantizedBlocks | None:
    """The weights [features, outputs] in this format, exactly, or None where it does not hold them.

    The format has scales of type int8 with a unit for every `unit_size` weights, with or without float zero points; or
    float16 scales and no zero points.
    """
    features, outputs = weight.shape
    span = format.unit_size or format.block_size
    if features % span:
        return None
    parts = []
    rows = max(1, CHUNK // features)
    for start in range(0, outputs, rows):
        blocks = split_columns(weight[:, start : start + rows], format.block_size)
        part = _find(blocks.reshape(-1, span // format.block_size, format.block_size), format)
        if part is None:
            return None
        parts.append(part)
    encoding = _Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    shape = (outputs, features // format.block_size)
    scales = _floats(encoding.steps, encoding.exponents).reshape(shape)
    codes = encoding.codes.astype(np.uint8).reshape(*shape, format.block_size)
    levels = _levels(encoding.steps, encoding.units, encoding.exponents, outputs) if format.unit_size else None
    if format.zero_points == "none":
        return QuantizedBlocks(codes, scales, np.full(shape, format.middle, np.float32), format, features, levels)
    values = _floats(encoding.minima, encoding.exponents).reshape(shape)
    zero_points = np.divide(-values, scales, out=np.zeros_like(values), where=scales != 0)
    minima = _levels(encoding.minima, encoding.minimum_units, encoding.exponents, outputs)
    return QuantizedBlocks(codes, scales, zero_points, format, features, levels, minima)


def exact_codes(weight: Floats, format: BlockFormat) -> QuantizedBlocks:
    """Find the codes of weights that are known to have exact ones. ValueError if they have none."""
    found = find_exact_codes(weight, format)
    if found is None:
        raise ValueError(f"the weights are no multiples of anything in {format}")
    return found


def _find(weights: Floats, format: BlockFormat) -> _Found | None:
    whole = _integers(weights)
    if whole is None:
        return None
    return _symmetric(*whole, format) if format.zero_points == "none" else _with_minima(*whole, format)


def _symmetric(integers: Integers, exponents: Integers, format: BlockFormat) -> _Found | None:
    """w = step · (code − middle). The outermost code, 0, has no opposite, so that a step's sign may matter."""
    steps = np.gcd.reduce(integers, axis=-1)
    codes = integers // np.maximum(steps, 1)[..., None]
    above, below = codes.max(axis=-1), -codes.min(axis=-1)
    most = np.maximum(above, below)
    limit = LARGEST_MULTIPLIER + 1 if format.unit_size else 1
    found = None if (most > format.middle).any() else _units(steps, most, format.middle, limit, exponents)
    if found is None:
        return None
    units, shares = found
    over, under = above * shares == format.middle, below * shares == format.middle
    signs = under.astype(np.int64) - over  # 0: either
    if (over & under).any():
        return None
    numbers = steps // np.maximum(units[:, None] * shares, 1)
    # int8 reaches to −128 and 127: where 128 is needed the unit's sign is the opposite of the step's
    outermost = (numbers > LARGEST_MULTIPLIER) & (limit > 1)
    wanted = -(signs * outermost)
    if ((wanted.max(axis=1) > 0) & (wanted.min(axis=1) < 0)).any():
        return None
    directions = np.where(wanted.min(axis=1) < 0, -1, 1)
    signs = np.where(signs == 0, np.where(outermost, -directions[:, None], 1), signs)
    codes = codes * (signs * shares)[..., None] + format.middle
    steps = signs * (steps // shares)
    none = np.zeros_like(units)
    return _Found(codes, steps, directions * units, np.zeros_like(steps), none, exponents)


def _with_minima(integers: Integers, exponents: Integers, format: BlockFormat) -> _Found | None:
    """w = step · code + minimum."""
    lowest = integers.min(axis=-1)
    above = integers - lowest[..., None]
    steps = np.gcd.reduce(above, axis=-1)
    codes = above // np.maximum(steps, 1)[..., None]
    most = codes.max(axis=-1)
    if (most > format.top).any():
        return None
    minima, minimum_units = np.zeros_like(steps), np.zeros(len(steps), np.int64)
    finer, shifts = np.ones_like(steps), np.zeros_like(steps)

    def place(rows: Integers, units: Integers, shares: Integers) -> Booleans:
        part = steps[rows] // shares
        places = _Places(lowest[rows], part, most[rows] * shares, part // units[:, None], format.top)
        solved, *found = places.resolve(exponents[rows])
        for whole, one in zip((minima, minimum_units, finer, shifts), found, strict=True):
            whole[rows[solved]] = one[solved]
        return solved

    found = _units(steps, most, format.top, LARGEST_MULTIPLIER, exponents, place)
    if found is None:
        return None
    units, shares = found
    codes = codes * (shares * finer)[..., None] + shifts[..., None]
    return _Found(codes, steps // (shares * finer), units, minima, minimum_units, exponents)


def _units(
    steps: Integers,
    most: Integers,
    room: int,
    limit: int,
    exponents: Integers,
    accept: Callable[[Integers, Integers, Integers], Booleans] | None = None,
) -> tuple[Integers, Integers] | None:
    """Units [super-blocks] in float16, and the shares [super-blocks, blocks] to take of the steps, so that all are at
    most `limit` units; codes, at most `most`, become as many times larger and stay within `room`.

    accept: told rows, their units and shares, says which of them will do; for the others smaller units are tried.
    """
    common = np.gcd.reduce(steps, axis=1)
    units, shares = np.zeros_like(common), np.ones_like(steps)
    left = np.arange(len(common))
    for part in range(1, (LARGEST_MULTIPLIER if accept is None else MOST_PARTS) + 1):
        if not left.size:
            break
        unit, rest = np.divmod(np.maximum(common[left], part), part)  # of zeros: any
        share = _shares(steps[left] // unit[:, None], most[left], room, limit)
        good = np.flatnonzero((rest == 0) & _is_half(unit, exponents[left]) & (share > 0).all(axis=1))
        if accept is not None and good.size:
            good = good[accept(left[good], unit[good], share[good])]
        units[left[good]], shares[left[good]] = unit[good], share[good]
        left = np.delete(left, good)
    return None if left.size else (units, shares)


def _shares(numbers: Integers, most: Integers, room: int, limit: int) -> Integers:
    """The smallest divisor of each number that brings it to the limit; 0 where there is none."""
    shares = (numbers <= limit).astype(np.int64)
    for share in range(2, room + 1):
        if shares.all():
            break
        fits = (shares == 0) & (numbers % share == 0) & (numbers <= limit * share) & (most * share <= room)
        shares[fits] = share
    return shares


class _Places:
    """Places where code 0 may lie in each block: codes that do not use their whole range can be shifted, and a step can
    be taken in parts. Options are the first axis."""

    def __init__(self, lowest: Integers, steps: Integers, most: Integers, numbers: Integers, top: int) -> None:
        options = []
        for share in range(1, top + 1):
            for shift in range(top + 1):
                valid = (most * share + shift <= top) & (numbers % share == 0) & ((steps > 0) | (share + shift == 1))
                if valid.any():
                    options.append((share, shift, valid, lowest - shift * (steps // share)))
        self.shares, self.shifts = (np.array([option[i] for option in options]) for i in (0, 1))
        self.valid, self.minima = (np.array([option[i] for option in options]) for i in (2, 3))
        self.fewest = np.argsort(self.valid.sum(axis=0), axis=1, kind="stable")
        """Blocks [super-blocks, blocks] by their number of options."""

    def resolve(self, exponents: Integers) -> tuple[Booleans, Integers, Integers, Integers, Integers]:
        """Which super-blocks could be resolved; minima, their units [super-blocks] in float16, the share of the step
        and the shift of the codes."""
        count, blocks = self.minima.shape[1:]
        units, chosen = np.zeros(count, np.int64), np.zeros((count, blocks), np.int64)
        left = np.arange(count)
        parts = np.arange(1, LARGEST_MULTIPLIER + 1)
        fits = self.valid & (self.minima == 0)
        good = fits.any(axis=0).all(axis=1)
        chosen[good] = fits.argmax(axis=0)[good]
        left = left[~good]
        for rank in range(blocks):
            for option in range(len(self.minima)):
                if not left.size:
                    break
                block = self.fewest[left, rank]
                size = np.abs(self.minima[option, left, block]) * self.valid[option, left, block]
                unit, rest = np.divmod(size[:, None], parts)
                likely = (rest == 0) & (unit > 0) & _is_half(unit, exponents[left, None])
                rows, columns = np.nonzero(likely)
                tried = unit[rows, columns]
                good, choice = self._fit(left[rows], tried)
                rows, first = np.unique(rows[good], return_index=True)
                solved = left[rows]
                units[solved], chosen[solved] = tried[good][first], choice[good][first]
                left = np.delete(left, rows)
        minima = np.take_along_axis(self.minima, chosen[None], axis=0)[0]
        return ~np.isin(np.arange(count), left), minima, units, self.shares[chosen], self.shifts[chosen]

    def _fit(self, rows: Integers, units: Integers) -> tuple[Booleans, Integers]:
        """Whether all minima of these super-blocks can be multiples of the units, and by which options."""
        minima = self.minima[:, rows]
        fits = self.valid[:, rows] & (np.abs(minima) <= LARGEST_MULTIPLIER * units[:, None])
        fits &= minima % np.maximum(units, 1)[:, None] == 0
        return fits.any(axis=0).all(axis=1), fits.argmax(axis=0)


def _integers(weights: Floats) -> tuple[Integers, Integers] | None:
    """Weights as integers times a power of two for each super-block; None where they are too far apart."""
    if not np.isfinite(weights).all():
        return None
    mantissas, exponents = np.frexp(weights)
    whole = np.ldexp(mantissas, 24).astype(np.int64)
    lowest_bits = np.frexp((whole & -whole).astype(np.float32))[1] - 1
    lowest = np.where(whole == 0, 1 << 20, exponents - 24 + lowest_bits).min(axis=(1, 2))
    highest = np.where(whole == 0, -(1 << 20), exponents).max(axis=(1, 2))
    base = np.where(highest < lowest, 0, lowest) - SPARE_BITS
    if (highest - base > EXACT_BITS).any():
        return None
    return np.ldexp(weights.astype(np.float64), -base[:, None, None]).astype(np.int64), base.astype(np.int64)


def _floats(integers: Integers, exponents: Integers) -> Floats:
    """The numbers that integers [super-blocks, n] stand for."""
    return np.ldexp(integers.astype(np.float64), exponents[:, None].astype(np.int32)).astype(np.float32)


def _is_half(integers: Integers, exponents: Integers) -> Booleans:
    """Whether float16 holds the numbers that integers stand for."""
    numbers = np.ldexp(integers.astype(np.float64), exponents.astype(np.int32))
    with np.errstate(over="ignore"):
        return np.asarray(numbers.astype(np.float16).astype(np.float64) == numbers)


def _levels(numbers: Integers, units: Integers, exponents: Integers, outputs: int) -> Levels:
    multipliers = numbers // np.where(units == 0, 1, units)[:, None]
    halves = _floats(units[:, None], exponents).astype(np.float16)
    return Levels(multipliers.astype(np.int8).reshape(outputs, -1, numbers.shape[1]), halves.reshape(outputs, -1, 1))
