"""Drawings of what was cut where, as bars: for each layer its heads, its width and its parameters, before and after.

`draw_structure` says what there is to see; the terminal (`onnxpress.commands.printing`) and
`templates/structure.svg.j2` show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxpress.artifact.structure import LayerSizes, StructureChange

CELLS = 10
"""Characters of a bar of full length."""
HEAD_SIZE = "head size"


@dataclass(frozen=True)
class Bar:
    """A size before and after."""

    before: int
    after: int
    """0 of a layer that is gone."""

    def __str__(self) -> str:
        return f"{self.before:,}" if self.after == self.before else f"{self.before:,} → {self.after:,}"

    def cells(self, most: int) -> tuple[int, int]:
        """Return (characters of what is left, of what was cut), where `most` has a bar of full length."""
        whole, left = (
            round(CELLS * value / most) if most else 0 for value in (max(self.before, self.after), self.after)
        )
        left = max(left, 1) if self.after else 0
        return left, max(0, whole - left)


@dataclass(frozen=True)
class DrawnLayer:
    """The bars of a layer of the model before."""

    index: int
    """In the model before."""
    bars: Mapping[str, Bar]
    """By what they measure."""
    into: int | None = None
    """The layer that the weights of a layer that is gone were added to."""
    gone: bool = False

    @property
    def fate(self) -> str:
        """The fate of a layer that is gone."""
        return "" if not self.gone else "removed" if self.into is None else f"merged into {self.into}"


@dataclass(frozen=True)
class DrawnStack:
    """The layers of a stack, and what of them is shown."""

    name: str
    """`model.layers`"""
    layers: Sequence[DrawnLayer]

    @property
    def sizes(self) -> dict[str, int]:
        """The titles of bars, in order, and the longest of each. Sizes of heads are shown where one changed."""
        most: dict[str, int] = {}
        for layer in self.layers:
            for title, bar in layer.bars.items():
                most[title] = max(most.get(title, 0), bar.before, bar.after)
        return {
            title: value
            for title, value in most.items()
            if not title.endswith(HEAD_SIZE) or any(bar.after != bar.before for bar in self._left(title))
        }

    def summary(self, title: str) -> str:
        """Summarise a bar of all layers: `9 → 6`, or `1,536 → 832–1,536` where layers that are left differ."""
        bars = [layer.bars[title] for layer in self.layers if title in layer.bars]
        before, after = _range([bar.before for bar in bars]), _range([bar.after for bar in self._left(title)])
        return before if before == after else f"{before} → {after}"

    def _left(self, title: str) -> list[Bar]:
        return [layer.bars[title] for layer in self.layers if title in layer.bars and not layer.gone]


@dataclass(frozen=True)
class Drawing:
    """The picture of a structure that was cut."""

    totals: Mapping[str, Bar]
    """Bars of the whole model: parameters, vocabulary, hidden size of each stack."""
    stacks: Sequence[DrawnStack]
    onnx_only: Sequence[str]
    """Why no configuration can say all of it."""


def draw_structure(record: StructureChange) -> Drawing:
    """Draw all layers of the model before, in order, beside what became of them."""
    before, after = record.before, record.after
    totals = {"parameters": Bar(before.parameters, after.parameters)}
    if before.vocabulary and after.vocabulary:
        totals["vocabulary"] = Bar(before.vocabulary, after.vocabulary)
    for stack, width in before.hidden.items():
        left = after.hidden.get(stack)
        if width is not None and left is not None:
            totals["hidden size" if len(before.hidden) == 1 else f"hidden size of {stack}"] = Bar(width, left)
    stacks = [DrawnStack(name, _layers(layers, after.stacks.get(name, ()))) for name, layers in before.stacks.items()]
    return Drawing(totals, stacks, record.onnx_only)


def _layers(before: Sequence[LayerSizes], after: Sequence[LayerSizes]) -> list[DrawnLayer]:
    left = {layer.origin: layer for layer in after}
    into = {origin: layer.origin for layer in after for origin in layer.merged}
    drawn = []
    for layer in before:
        now = left.get(layer.origin)
        sizes, rest = _sizes(layer), _sizes(now) if now is not None else {}
        bars = {title: Bar(value, rest.get(title, 0)) for title, value in sizes.items()}
        drawn.append(DrawnLayer(layer.origin, bars, into.get(layer.origin), now is None))
    return drawn


def _sizes(layer: LayerSizes) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for prefix, attention in zip(("", "cross "), layer.attentions, strict=False):
        sizes |= {
            f"{prefix}query heads": attention.heads,
            f"{prefix}kv heads": attention.kv_heads,
            f"{prefix}{HEAD_SIZE}": attention.head_dim,
        }
    if layer.width is not None:
        sizes["feed-forward"] = layer.width
    return sizes | {"parameters": layer.parameters}


def _range(values: Sequence[int]) -> str:
    least, most = min(values, default=0), max(values, default=0)
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"
