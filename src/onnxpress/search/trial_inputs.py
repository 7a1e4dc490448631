"""Sample the inputs of a search's trials: some to fit formats to, others to judge them by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxpress.arrays import Feeds
from onnxpress.building.measuring import main_graph
from onnxpress.building.work import Work
from onnxpress.calibration.feeds import token_count
from onnxpress.optimizers.recipe import Recipe
from onnxpress.search.sensitivity import TrialInputs

ROWS, LENGTH = 4, 64
"""What losses are measured on: enough to rank groups by, and a few runs for each of them."""
SENTENCES = 16
"""At most as many, where rows are short."""
MASK = "attention_mask"


def sample_inputs(work: Work, recipe: Recipe) -> dict[str, TrialInputs]:
    """Sample for each graph the rows that the most demanding pass wants, and a few to judge by; no row is padded on the
    right."""
    kinds = (*recipe.formats.values(), *recipe.cuts.values())
    passes = [spec.build() for specs in kinds for spec in specs]
    calibrated = [graph_pass for graph_pass in passes if graph_pass.needs_samples]
    rows = max([graph_pass.wanted_rows for graph_pass in calibrated], default=0)
    length = max([graph_pass.wanted_length for graph_pass in calibrated], default=LENGTH)
    data, graph = work.judging.calibration, main_graph(work.reference)
    fit = data.feeds(graph, rows, length, work.judging.threads, work.sidecar_folder) if rows else {}
    judge: Mapping[str, Sequence[Feeds]]
    if data.source is None:
        judging_data = replace(data, seed=data.seed + 1, samples=None, length=None)
        judge = judging_data.feeds(graph, ROWS, LENGTH, work.judging.threads, work.sidecar_folder)
    else:
        # Text is cut into rows of a length: what judges begins behind all that was fitted to, and is as short as above.
        longer, shorter = data.length or length, min(data.length or length, LENGTH)
        parts = -(-longer // shorter) if work.artifact.task.startswith("text-generation") else 1
        wanted = parts * (data.samples or rows or ROWS) + SENTENCES
        judging_data = replace(data, samples=wanted, length=shorter if parts > 1 else data.length)
        every = judging_data.feeds(graph, wanted, length, work.judging.threads, work.sidecar_folder)
        judge = {name: _last(list(_single(feeds))) for name, feeds in every.items()}
    found = {}
    for name in work.current:
        key = name if name in judge else ""
        if key in judge:
            fitted = [feeds for batch in fit.get(key, ()) for feeds in _together(_single([batch]))]
            found[name] = TrialInputs(fitted, list(_together(_single(judge[key]))))
    return found


def _last(rows: Sequence[Feeds]) -> list[Feeds]:
    """Keep the last few rows: as many as hold the tokens of `ROWS` long ones, where they are text."""
    kept: list[Feeds] = []
    for row in reversed(rows):
        full = token_count(kept) >= ROWS * LENGTH or token_count([row]) == 0
        if len(kept) >= ROWS and (full or len(kept) >= SENTENCES):
            break
        kept.append(row)
    return kept[::-1]


def _single(batches: Iterable[Feeds]) -> Iterator[Feeds]:
    """Yield each row alone, without the padding on its right."""
    for batch in batches:
        count = len(next(iter(batch.values())))
        for row in range(count):
            feeds = {name: array[row : row + 1] for name, array in batch.items()}
            if MASK in feeds and feeds[MASK].ndim == 2:
                padded = feeds[MASK].shape
                kept = int(feeds[MASK].sum())
                feeds = {name: a[:, :kept] if a.shape == padded else a for name, a in feeds.items()}
            yield feeds


def _together(rows: Iterable[Feeds]) -> Iterator[Feeds]:
    """Join rows of the same shapes in one batch."""
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Feeds]] = {}
    for row in rows:
        groups.setdefault(tuple((name, array.shape) for name, array in row.items()), []).append(row)
    for group in groups.values():
        yield {name: np.concatenate([row[name] for row in group]) for name in group[0]}
