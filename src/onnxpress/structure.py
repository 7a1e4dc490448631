"""The sizes of a transformer, read from its graphs: layers, heads, widths, vocabulary.

What structural passes leave behind is compared with what came in: the configuration follows it
(`onnxpress.reduced_config`), and `inspect` and the model card show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.optimizers.anatomy import Anatomy, Attention, Block, anatomy_of
from onnxpress.optimizers.anatomy.products import find_products
from onnxpress.tensors import concrete_shape, rows_of

LAYERS = "onnxpress.layers"
"""Key of a graph's metadata: JSON, for each stack that was cut the original index of every layer that is left, such as
{"model.layers": [0, 1, 3]}."""
RECORD = "structure"
"""Key under which an artifact's `export` holds what was cut: `Record.to_dict`."""
_TABLES = ("cos_cache", "sin_cache")
Row = tuple[str, str, str]


@dataclass(frozen=True)
class Heads:
    """Of one attention."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        count = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{count} heads × {self.head_dim}"


@dataclass(frozen=True)
class Layer:
    origin: int
    """Its index before layers were dropped."""
    attentions: tuple[Heads, ...]
    """Self-attention, then cross-attention; those whose sizes the graph does not tell are left out."""
    width: int | None
    """Features inside of the feed-forward network; None for experts and the like."""

    @property
    def sizes(self) -> str:
        parts = [str(one) for one in dict.fromkeys(self.attentions)]
        return ", ".join([*parts, *([f"FFN {self.width}"] if self.width is not None else [])]) or "–"


@dataclass(frozen=True)
class Structure:
    stacks: Mapping[str, tuple[Layer, ...]]
    """By path: `model.layers`."""
    hidden: Mapping[str, int | None]
    """Features of the hidden states of each stack; None where they differ between its layers."""
    vocabulary: int | None
    """Rows of the table that tokens are looked up in."""
    parameters: int
    frequencies: tuple[tuple[float, ...], ...] = ()
    """Of each table of rotations, radians per position, one for each plane."""
    scales: frozenset[float] = frozenset()
    """That scores of attention are multiplied by; empty where attention is spelled out."""
    names: frozenset[str] = frozenset()
    """Of the weights and biases of all products but the head."""
    tied: bool = False
    """Whether the head multiplies by an embedding table."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "vocabulary": self.vocabulary,
            "hidden": dict(self.hidden),
            "stacks": {stack: [asdict(layer) for layer in layers] for stack, layers in self.stacks.items()},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Structure:
        stacks = {
            stack: tuple(
                Layer(one["origin"], tuple(Heads(**heads) for heads in one["attentions"]), one["width"])
                for one in layers
            )
            for stack, layers in record["stacks"].items()
        }
        return cls(stacks, record["hidden"], record["vocabulary"], record["parameters"])


@dataclass(frozen=True)
class Record:
    """What was cut since the model was exported, and what of it a configuration of transformers cannot say."""

    before: Structure
    after: Structure
    onnx_only: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "onnx_only": list(self.onnx_only)}

    @classmethod
    def of(cls, export: Mapping[str, Any]) -> Record | None:
        """The record of an artifact; None if nothing was cut."""
        found = export.get(RECORD)
        if found is None:
            return None
        before, after = Structure.from_dict(found["before"]), Structure.from_dict(found["after"])
        return cls(before, after, tuple(found["onnx_only"]))


def read_structure(graphs: Iterable[ir.Model]) -> Structure | None:
    """The structure of a model of one or several graphs; None where no layers are recognised.

    Of the two decoders of an encoder-decoder the first counts: the other takes keys and values from the cache.
    """
    stacks: dict[str, tuple[Layer, ...]] = {}
    hidden: dict[str, int | None] = {}
    frequencies: set[tuple[float, ...]] = set()
    scales: set[float] = set()
    weights: dict[str, int] = {}
    names: set[str] = set()
    vocabulary: int | None = None
    tied = False
    for model in graphs:
        try:
            anatomy = anatomy_of(model)
        except UnsupportedModelError:
            return None
        origins = json.loads(model.metadata_props.get(LAYERS, "{}"))
        for stack, blocks in _stacks(anatomy).items():
            origin = origins.get(stack, range(len(blocks)))
            layers = tuple(_layer(index, block) for index, block in zip(origin, blocks, strict=True))
            stacks.setdefault(stack, layers)
            widths = {width for block in blocks for width in _hidden_widths(block)}
            hidden.setdefault(stack, widths.pop() if len(widths) == 1 else None)
            for block in blocks:
                for one in block.attentions:
                    frequencies |= set(_frequencies(one))
                    scales |= set(_scale(one))
        vocabulary = _vocabulary(anatomy) if vocabulary is None else vocabulary
        weights |= _weights(model)
        tied |= anatomy.tied
        for product in find_products(model.graph):
            if anatomy.head is None or product.node is not anatomy.head.node:
                names |= {product.name, *([str(product.bias.name)] if product.bias is not None else [])}
    parameters, tables = sum(weights.values()), tuple(sorted(frequencies))
    return Structure(stacks, hidden, vocabulary, parameters, tables, frozenset(scales), frozenset(names), tied)


def compare(before: Structure, after: Structure) -> list[Row]:
    """(what, before, after) for everything that differs: a row for each run of layers that were cut alike."""
    rows: list[Row] = []
    for stack, layers in after.stacks.items():
        old = before.stacks.get(stack, ())
        if len(old) != len(layers):
            dropped = sorted({one.origin for one in old} - {one.origin for one in layers})
            rows.append((stack, f"{len(old)} layers", f"{len(layers)} layers, without {_ranges(dropped)}"))
        sizes = {one.origin: one.sizes for one in old}
        changed = [one for one in layers if sizes.get(one.origin) not in (None, one.sizes)]
        for (was, now), run in _runs(changed, lambda one, old=sizes: (old[one.origin], one.sizes)):
            title = stack if len(run) == len(layers) else f"{stack}.{_ranges(run)}"
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


def describe(structure: Structure) -> list[str]:
    """A line for each stack whose layers are alike, more where they differ."""
    lines = []
    for stack, layers in structure.stacks.items():
        width = structure.hidden.get(stack)
        outside = f"hidden size {width}" if width is not None else "mixed hidden sizes"
        runs = list(_runs([*layers], lambda one: one.sizes))
        if len(runs) == 1:
            lines.append(f"{stack}: {len(layers)} layers, {outside}, {runs[0][0]}")
        else:
            lines.append(f"{stack}: {len(layers)} layers, {outside}")
            lines += [f"{stack}.{_ranges(run)}: {sizes}" for sizes, run in runs]
    return lines


def _stacks(anatomy: Anatomy) -> dict[str, list[Block]]:
    stacks: dict[str, list[Block]] = {}
    for block in anatomy.blocks:
        stacks.setdefault(block.title.rpartition(".")[0], []).append(block)
    return stacks


def _layer(origin: int, block: Block) -> Layer:
    attentions = tuple(
        Heads(one.heads, one.kv_heads or one.heads, one.head_dim)
        for one in block.attentions
        if one.heads is not None and one.head_dim is not None
    )
    return Layer(origin, attentions, block.feed_forward.down.features[0] if block.feed_forward else None)


def _hidden_widths(block: Block) -> Iterator[int]:
    for one in block.attentions:
        if one.output is not None:
            yield one.output.features[1]
    if block.feed_forward is not None:
        yield block.feed_forward.down.features[1]


def _frequencies(attention: Attention) -> Iterator[tuple[float, ...]]:
    """Of the tables [positions, planes], whose row 1 is the angle of one position."""
    tables = [value.const_value for value in attention.rotary or ()]
    if len(tables) != 2 or any(one is None or concrete_shape(one)[0] < 2 for one in tables):
        return
    cos, sin = (np.asarray(rows_of(one)(1, 2), np.float64)[0] for one in tables if one is not None)
    yield tuple(float(f"{angle:.7g}") for angle in np.arctan2(sin, cos))


def _scale(attention: Attention) -> Iterator[float]:
    if attention.node.op_type == "Softmax" or attention.head_dim is None:
        return
    given = attention.node.attributes.get("scale")
    value = float(given.value) if given is not None else 0.0
    yield float(f"{value or attention.head_dim**-0.5:.6g}")


def _vocabulary(anatomy: Anatomy) -> int | None:
    """Rows of the table whose indices are a graph input called …input_ids, as they are or reshaped."""
    for table in anatomy.embeddings:
        value = table.node.inputs[1]
        while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Cast", "Reshape"):
            value = maker.inputs[0]
        if value is not None and value.is_graph_input() and str(value.name).endswith("input_ids"):
            tensor = table.weight.const_value
            return concrete_shape(tensor)[0] if tensor is not None else None
    return None


def _weights(model: ir.Model) -> dict[str, int]:
    """Elements of each floating-point weight."""
    return {
        name: math.prod(concrete_shape(value.const_value))
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.size > 1
        and not name.endswith(_TABLES)
    }


def _runs(layers: Sequence[Layer], key: Any) -> Iterator[tuple[Any, list[int]]]:
    """(key, original indices) for each run of neighbours with the same key."""
    for found, run in groupby(layers, key):
        yield found, [one.origin for one in run]


def _ranges(indices: Sequence[int]) -> str:
    """`0–3, 7`"""
    parts = []
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        found = [index for _, index in run]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}")
    return ", ".join(parts)
