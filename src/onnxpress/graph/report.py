"""A pass's report: matches in a graph, and what was left alone, with the reasons."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """The changes of a pass, and what it looked at but left alone; both are counts by operator or by reason."""

    matched: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    errors: dict[str, float] = field(default_factory=dict)
    """The loss by weight: |x·Ŵ − x·W|² / |x·W|² on the samples, for passes that know it."""

    def match(self, what: str, count: int = 1) -> None:
        self.matched[what] += count

    def measure(self, weight: str, error: float) -> None:
        self.errors[weight] = error

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] += count
