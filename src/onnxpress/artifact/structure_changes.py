"""Compare two structures, in words: a row for each run of layers that were cut alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from onnxpress.artifact.structure import LayerSizes, Structure

BeforeAfter = tuple[str, str, str]
"""(what, before, after), as text."""


def list_changes(before: Structure, after: Structure) -> list[BeforeAfter]:
    """List (what, before, after) for everything that differs: a row for each run of layers that were cut alike."""
    rows: list[BeforeAfter] = []
    for stack, layers in after.stacks.items():
        old = before.stacks.get(stack, ())
        if len(old) != len(layers):
            dropped = sorted({layer.origin for layer in old} - {layer.origin for layer in layers})
            rows.append((stack, f"{len(old)} layers", f"{len(layers)} layers, without {ranges(dropped)}"))
        sizes = {layer.origin: layer.sizes for layer in old}
        changed = [layer for layer in layers if sizes.get(layer.origin) not in (None, layer.sizes)]
        for (was, now), run in _runs(changed, lambda layer, old=sizes: (old[layer.origin], layer.sizes)):
            title = stack if len(run) == len(layers) else f"{stack}.{ranges(run)}"
            rows.append((title, was, now))
    for stack, width in after.hidden.items():
        if width != before.hidden.get(stack, width):
            rows.append((f"hidden size of {stack}", str(before.hidden[stack] or "mixed"), str(width or "mixed")))
    if after.vocabulary != before.vocabulary:
        rows.append(("vocabulary", f"{before.vocabulary or 0:,}", f"{after.vocabulary or 0:,}"))
    if rows or abs(after.parameters - before.parameters) > before.parameters / 100:
        change = after.parameters / before.parameters - 1 if before.parameters else 0.0
        rows.append(("parameters", f"{before.parameters:,}", f"{after.parameters:,} ({change:+.1%})"))
    return rows


def _runs(layers: Sequence[LayerSizes], key: Any) -> Iterator[tuple[Any, list[int]]]:
    """Yield (key, original indices) for each run of neighbours with the same key."""
    for found, run in groupby(layers, key):
        yield found, [layer.origin for layer in run]


def ranges(indices: Sequence[int]) -> str:
    """`0–3, 7`"""
    parts = []
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        found = [index for _, index in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}")
    return ", ".join(parts)
