"""Which weights of a matrix to keep: scores, patterns and how sparsity grows.

A weight W is [inputs, outputs], a mask a boolean array of its shape, True where a weight stays. Scores are float32 of
that shape as well, and never negative: the lowest go. A weight that is zero already is the first to go, so that pruning
twice to one sparsity is pruning once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxpress.arrays import Booleans, Floats

Score = Literal["magnitude", "l2", "ratio", "wanda"]
GONE = np.float32(-1)
"""The score of a weight that is zero, below all others."""


@dataclass(frozen=True)
class Pattern:
    """The shape of what goes at once; see `parse_pattern`."""

    kept: int = 0
    group: int = 0
    """At most `kept` of every `group` consecutive inputs stay, where `group` is not 0."""
    rows: int = 1
    columns: int = 1
    """Outputs and inputs of a block, which stays or goes as a whole."""

    @property
    def sparsity(self) -> float | None:
        """The share of weights that goes, where the pattern says so itself."""
        return 1 - self.kept / self.group if self.group else None

    def obstacle(self, inputs: int, outputs: int) -> str | None:
        """Why a matrix cannot have this pattern, if it cannot."""
        if self.group and inputs % self.group:
            return f"groups of {self.group} do not divide {inputs} inputs"
        if inputs % self.columns or outputs % self.rows:
            return f"blocks of {self.rows}x{self.columns} do not divide {outputs} outputs and {inputs} inputs"
        return None


def parse_pattern(text: str) -> Pattern:
    """`unstructured`; `N:M`, at most N of every M consecutive inputs of an output stay; `block:RxC`, R outputs times C
    inputs. ValueError for anything else."""
    if text == "unstructured":
        return Pattern()
    if match := re.fullmatch(r"(\d{1,4}):(\d{1,4})", text):
        kept, group = int(match[1]), int(match[2])
        if not 0 < kept < group:
            raise ValueError(f"pattern {text} must keep at least 1 weight and fewer than all {group}")
        return Pattern(kept, group)
    if match := re.fullmatch(r"block:(\d{1,5})x(\d{1,5})", text):
        rows, columns = int(match[1]), int(match[2])
        if not rows or not columns:
            raise ValueError(f"pattern {text} has empty blocks")
        return Pattern(rows=rows, columns=columns)
    raise ValueError(f"pattern must be unstructured, N:M such as 2:4, or block:RxC such as block:4x16, not {text!r}")


def scores(weight: Floats, score: Score, *, strength: float = 1.0, norms: Floats | None = None) -> Floats:
    """How much each weight of [inputs, outputs] matters, [inputs, outputs] float32; -1 where it is zero.

    magnitude   |w|
    l2          w²: the order of |w|, but a block counts with the sum of its squares
    ratio       see `importance_ratio`; `strength` is its λ
    wanda       |w| · `norms` of the input, the root mean square of what it reads (Sun et al. 2023)

    Raises ValueError for an unknown score, or one without what it needs.
    """
    magnitudes = np.abs(weight)
    if score == "magnitude":
        values = magnitudes
    elif score == "l2":
        values = np.square(magnitudes)
    elif score == "ratio":
        values = importance_ratio(weight, strength)
    elif score == "wanda":
        if norms is None or norms.shape != weight.shape[:1]:
            raise ValueError(f"wanda needs the norms of {len(weight)} inputs")
        values = magnitudes * norms[:, None].astype(np.float32)
    else:
        raise ValueError(f"score must be one of {', '.join(get_args(Score))}, not {score!r}")
    return np.where(magnitudes == 0, GONE, values).astype(np.float32)


def importance_ratio(weight: Floats, strength: float) -> Floats:
    """|w| / (λ · mean|row of w| + (1 − λ) · mean|W|), a row being all inputs of one output; λ = `strength` in [0, 1].

    Our reading of the founding articles, which describe a ratio weighted by λ in words. At λ = 0 the order is that of
    magnitude over the whole matrix; at λ = 1 it does not change when a row is multiplied by a number, so that quiet
    outputs lose no more weights than loud ones. Rows of zeros score 0.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie between 0 and 1, not {strength}")
    magnitudes = np.abs(weight, dtype=np.float64)
    scale = strength * magnitudes.mean(axis=0) + (1 - strength) * magnitudes.mean()
    ratio: Floats = np.divide(magnitudes, scale, out=np.zeros_like(magnitudes), where=scale > 0).astype(np.float32)
    return ratio


def choose_mask(values: Floats, sparsity: float, pattern: Pattern, *, per_output: bool = False) -> Booleans:
    """The mask that takes out the lowest scores [inputs, outputs].

    Args:
        sparsity: exactly round(sparsity · weights) go, of each output if `per_output`; of blocks, so many. With N:M
            it says nothing, exactly M − N of each group go.
        per_output: compare the weights of one output with each other only; meaningless for blocks.

    Where scores are equal, those of the first inputs go (and of these, of the first outputs).
    Raises ValueError where the pattern does not fit, see `Pattern.obstacle`, and for a sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie between 0 and 1, not {sparsity}")
    if reason := pattern.obstacle(*values.shape):
        raise ValueError(reason)
    inputs, outputs = values.shape
    if pattern.group:
        grouped = values.reshape(-1, pattern.group, outputs)
        grouped_mask: Booleans = _without_lowest(grouped, pattern.group - pattern.kept).reshape(inputs, outputs)
        return grouped_mask
    if pattern.rows * pattern.columns > 1:
        shape = (inputs // pattern.columns, pattern.columns, outputs // pattern.rows, pattern.rows)
        blocks = np.maximum(values, 0).reshape(shape).sum(axis=(1, 3), dtype=np.float64)
        kept = _without_lowest(blocks.reshape(1, -1, 1), count_of(sparsity, blocks.size)).reshape(blocks.shape)
        whole: Booleans = np.repeat(np.repeat(kept, pattern.columns, axis=0), pattern.rows, axis=1)
        return whole
    if per_output:
        rows: Booleans = _without_lowest(values[None], count_of(sparsity, inputs))[0]
        return rows
    return _without_lowest(values.reshape(1, -1, 1), count_of(sparsity, values.size)).reshape(values.shape)


def is_sparse(weight: Floats, sparsity: float, pattern: Pattern, *, per_output: bool = False) -> bool:
    """Whether a weight has all the zeros that `choose_mask` would make."""
    nonzero = weight != 0
    return not bool(nonzero[~choose_mask(nonzero.astype(np.float32), sparsity, pattern, per_output=per_output)].any())


def count_of(sparsity: float, size: int) -> int:
    """How many of `size` weights go."""
    return min(round(sparsity * size), size)


def _without_lowest(values: NDArray[np.floating], count: int) -> Booleans:
    """[groups, members, columns]: True but for the `count` lowest members of each group and column."""
    mask = np.ones(values.shape, np.bool_)
    if count:
        lowest = np.argsort(values, axis=1, kind="stable")[:, :count]
        np.put_along_axis(mask, lowest, False, axis=1)
    return mask


class Threshold:
    """The `count`-th lowest of numbers that stream by, exactly, in 0.5 MB: the sparsity of a whole model in one cut.

    Numbers that are not negative are ordered as their bits are; the upper and then the lower halves of these are
    counted. `read` is called twice and yields the same arrays each time.
    """

    def __init__(self, read: Callable[[], Iterable[Floats]], sparsity: float) -> None:
        upper, size = np.zeros(1 << 16, np.int64), 0
        for array in read():
            upper += np.bincount(_bits(array) >> 16, minlength=1 << 16)
            size += array.size
        count = count_of(sparsity, size)
        reached = np.cumsum(upper)
        top = int(np.searchsorted(reached, count)) if count else 0
        before = int(reached[top] - upper[top])
        lower = np.zeros(1 << 16, np.int64)
        for array in read():
            bits = _bits(array)
            lower += np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
        reached = before + np.cumsum(lower)
        place = int(np.searchsorted(reached, count)) if count else 0
        self.bits = top << 16 | place
        """The bits of the highest number that goes."""
        self.ties = count - int(reached[place] - lower[place])
        """How many numbers equal to it go; the first ones."""

    def mask(self, values: Floats) -> Booleans:
        """The mask of one of the arrays; to be called in the order in which they were read, once for each."""
        bits = _bits(values)
        gone = bits < self.bits
        equal = np.flatnonzero(bits == self.bits)[: self.ties]
        self.ties -= len(equal)
        gone[equal] = True
        return ~gone.reshape(values.shape)


def _bits(found: Floats) -> NDArray[np.int64]:
    """In the order of the numbers; those below zero count as zero."""
    return np.maximum(found, np.float32(0)).reshape(-1).view(np.int32).astype(np.int64)


def growing(sparsity: float, rounds: int) -> list[float]:
    """The sparsity of each round, rising with the cube: s · (1 − (1 − t)³), t = 1/rounds … 1 (Zhu & Gupta 2017)."""
    return [*(sparsity * (1 - (1 - step / rounds) ** 3) for step in range(1, rounds)), sparsity]
