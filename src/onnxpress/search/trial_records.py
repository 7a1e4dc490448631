"""A file of what was found out about parts and formats: one line for each, added as soon as it is known."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from onnxpress.optimizers.fitting.statistics import TINY
from onnxpress.search.formats import Format

ALIKE = 3.0
"""By how much the ratios of two peaks to their means may differ."""


@dataclass(frozen=True)
class TrialRecord:
    """A part in a format."""

    part: str
    format: str
    """Its `key`: pass and options."""
    nbytes: int
    """The bytes of the part's constants; −1 where the format does not take the part."""
    error: float = 0.0
    """Relative to what the part makes: the mean of all tokens."""
    peak: float = 0.0
    """The largest error of a token."""
    loss: float | None = None
    """None as long as it was not measured."""
    left: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    """(inputs, outputs) of the products of each group that changed, for a block that was cut."""

    def alike(self, other: TrialRecord) -> bool:
        """Tell whether both lose in the same way, more or less of it: spread over tokens, or in a few of them.

        What a whole model loses follows the mean error within a factor of 1.5 where that holds (SmolLM2-135M, blocks
        and int8 per token), and does not where one range for a prompt lets a few tokens pay for all.
        """
        spread, others = (max(one.peak, TINY) / max(one.error, TINY) for one in (self, other))
        return max(spread, others) <= ALIKE * min(spread, others)

    @property
    def fits(self) -> bool:
        """True if the format takes the part."""
        return self.nbytes >= 0


class TrialRecords:
    """All records by part and format; in memory only without a path. The last word on a pair counts."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[tuple[str, str], TrialRecord] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            # Lines may be damaged: the last one of a process that was killed is.
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                row = json.loads(line)
                self._remember(TrialRecord(row.pop("unit"), **row))
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def get(self, part: str, format: Format) -> TrialRecord | None:
        """Look up what is known of a part in a format."""
        return self._known.get((part, format.key))

    def add(self, record: TrialRecord) -> TrialRecord:
        """Keep what was found out about a part in a format."""
        self._remember(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                row = asdict(record)
                file.write(json.dumps({"unit": row.pop("part"), **row}) + "\n")
        return record

    def _remember(self, record: TrialRecord) -> None:
        self._known[record.part, record.format] = record
