"""Calibration: the samples of a pass that looks at activations, and what may be spent on them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from onnxpress.arrays import Feeds
from onnxpress.calibration.feeds import feeds_graph
from onnxpress.calibration.walk import MEMORY_BYTES, Accumulator, FeedMode, Walk

Computed = TypeVar("Computed")
NO_SAMPLES = "no sample inputs for this graph"


@dataclass(frozen=True)
class Calibration:
    """Samples, and what may be spent on them."""

    samples: Sequence[Feeds] = ()
    """Inputs by name, each one run of the graph; an empty key/value cache may be left out."""
    folder: Path | None = None
    """Where progress is kept, see `Walk`."""
    memory_bytes: int = MEMORY_BYTES
    threads: int | None = None
    progress: Callable[[int, int], None] | None = None
    walks: list[Walk] = field(default_factory=list, compare=False)
    """All that were begun and keep files."""
    memory: dict[Hashable, Any] | None = field(default=None, compare=False)
    """What passes found out about one graph and these samples, for the same passes with other options; see `recall`."""

    def fits(self, model: ir.Model) -> bool:
        """Whether there are samples and they are for this graph."""
        return bool(self.samples) and all(feeds_graph(sample, model) for sample in self.samples)

    def walk(self, model: ir.Model, *, feed: FeedMode = "modified", method: str = "", by_product: bool = False) -> Walk:
        """A walk over `model`; one without a method keeps nothing that another process could use."""
        folder = self.folder if method else None
        walk = Walk(
            model, self.samples, feed, self.memory_bytes, folder, method, self.threads, self.progress, by_product
        )
        if folder is not None:
            self.walks.append(walk)
        return walk

    def recall(
        self, key: Hashable, compute: Callable[[], Computed], still: Callable[[Computed], bool] = lambda _: True
    ) -> Computed:
        """Take what was found under a key, if it will still do, or what `compute` finds; without a memory, that."""
        if self.memory is None:
            return compute()
        if key not in self.memory or not still(self.memory[key]):
            self.memory[key] = compute()
        known: Computed = self.memory[key]
        return known

    def discard(self) -> None:
        """Remove what walks kept; the graphs have been written."""
        while self.walks:
            self.walks.pop().discard()

    def observe(self, model: ir.Model, wanted: Mapping[str, Sequence[Accumulator]]) -> None:
        """Hand what a graph computes for each value named in `wanted` to its accumulators."""
        left = set(wanted)
        for step in self.walk(model, feed="original"):
            here = left & step.values
            step.observe({name: wanted[name] for name in wanted if name in here})
            left -= here
            if not left:
                return
