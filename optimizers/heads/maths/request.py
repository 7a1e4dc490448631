"""How many heads an attention is to have, in steps that can be taken; requests that make no sense are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnxpress.errors import UsageError

Sizes = tuple[int, int, int]
"""(heads, kv_heads, head_dim)"""
Wanted = tuple[int | None, int | None, int | None]
"""Likewise; None for what follows from the others."""


@dataclass(frozen=True)
class HeadRequest:
    """A request to every attention, in numbers or in shares of what it has."""

    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ratio: float | None = None
    """The share of query heads,"""
    kv_ratio: float | None = None
    """or of key/value heads."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise UsageError("reduce-heads: say how many heads are to stay", hint="reduce-heads:heads=6")
        for name in ("ratio", "kv_ratio"):
            others = sorted(given.keys() - {name, "head_dim"})
            if name in given and others:
                raise UsageError(f"reduce-heads: give {name}, a share of the heads, without {' and '.join(others)}")
            if name in given and not 0 < given[name] <= 1:
                raise UsageError(f"reduce-heads: {name} is a share of the heads, above 0 and up to 1: {given[name]}")

    def wanted(self, before: Sizes) -> Wanted:
        """Numbers for an attention of these sizes: of those that can be had the nearest to a share, the larger of two.

        Where several query heads share a key and a value, they leave evenly, so that their number stays a multiple of
        the key/value heads, which all stay; of key/value heads any number stays, with all of their query heads. Where
        every head has its own, any number of heads can stay; and the key/value heads merge to a divisor of the heads.
        """
        heads, kv_heads, _ = before
        grouped = heads != kv_heads
        if self.ratio is not None:
            counts = range(kv_heads if grouped else 1, heads + 1, kv_heads if grouped else 1)
            return _nearest(counts, self.ratio * heads), None, self.head_dim
        if self.kv_ratio is not None:
            counts_kv = [count for count in range(1, kv_heads + 1) if grouped or heads % count == 0]
            return None, _nearest(counts_kv, self.kv_ratio * kv_heads), self.head_dim
        return self.heads, self.kv_heads, self.head_dim


@dataclass(frozen=True)
class HeadPlan:
    """From some sizes to others: heads are dropped first, then key/value heads are merged."""

    before: Sizes
    dropped: tuple[int, int]
    """(heads, kv_heads) after dropping."""
    after: Sizes

    @property
    def drops(self) -> bool:
        return self.dropped != self.before[:2]

    @property
    def merges(self) -> bool:
        return self.dropped[1] != self.after[1]

    @property
    def narrows(self) -> bool:
        return self.before[2] != self.after[2]

    @property
    def changes(self) -> bool:
        return self.before != self.after

    def __str__(self) -> str:
        return " → ".join(f"{heads}/{kv} heads × {size}" for heads, kv, size in (self.before, self.after))


def plan_heads(before: Sizes, wanted: Wanted, where: str) -> HeadPlan:
    """The plan for one attention.

    Args:
        wanted: (heads, kv_heads, head_dim), None for what follows from the others: key/value heads follow query heads
            where there are as many; query heads follow key/value heads in groups, where those go whole.
        where: names the attention in errors.

    Raises:
        UsageError: a target is larger than what there is, or does not divide.
    """
    heads, kv_heads, head_dim = before
    group = heads // kv_heads
    new_heads, new_kv, new_dim = wanted
    if new_heads is None:
        new_heads = new_kv * group if new_kv is not None and group > 1 else heads
    if new_kv is None:
        new_kv = new_heads if group == 1 else kv_heads
    new_dim = head_dim if new_dim is None else new_dim
    for what, found, new in zip(("heads", "kv_heads", "head_dim"), before, (new_heads, new_kv, new_dim), strict=True):
        if not 1 <= new <= found:
            raise UsageError(f"{where} has {what} {found}; it cannot be reduced to {new}")
    if new_heads % new_kv:
        raise UsageError(
            f"{where}: {new_heads} query heads cannot share {new_kv} key/value heads evenly",
            hint=f"choose heads as a multiple of {new_kv}, or kv_heads as a divisor of {new_heads}",
        )
    after = (new_heads, new_kv, new_dim)
    if new_heads // new_kv <= group:
        return HeadPlan(before, (new_heads, new_kv), after)
    for size in range(group, 0, -1):
        between = new_heads // size
        if new_heads % size == 0 and between <= kv_heads and between % new_kv == 0:
            return HeadPlan(before, (new_heads, between), after)
    raise UsageError(
        f"{where}: {heads} query heads over {kv_heads} key/value heads cannot become {new_heads} over {new_kv}: "
        f"no equal number of key/value heads would be merged into each",
        hint="choose kv_heads as a divisor of what there is",
    )


def plan_resampling(before: Sizes, wanted: Wanted, where: str) -> HeadPlan:
    """Likewise where every new head is a mixture: sizes need not divide the old ones."""
    heads, kv_heads, head_dim = before
    new_heads = wanted[0] or (wanted[1] * (heads // kv_heads) if wanted[1] and heads != kv_heads else heads)
    new_kv = wanted[1] or (new_heads if heads == kv_heads else kv_heads)
    plan = HeadPlan(before, (new_heads, new_kv), (new_heads, new_kv, wanted[2] or head_dim))
    for what, found, new in zip(("heads", "kv_heads", "head_dim"), before, plan.after, strict=True):
        if not 1 <= new <= found:
            raise UsageError(f"{where} has {what} {found}; it cannot be reduced to {new}")
    if new_heads % new_kv:
        raise UsageError(f"{where}: {new_heads} query heads cannot share {new_kv} key/value heads evenly")
    return plan


def _nearest(counts: Iterable[int], wanted: float) -> int:
    return min(counts, key=lambda count: (abs(count - wanted), -count))
