"""The sizes of a transformer, read from its graphs: layers, heads, widths, vocabulary.

What structural passes leave behind is compared with what came in: the configuration follows it
(`onnxpress.artifact.reduced_config`), `inspect` and the report draw it (`onnxpress.report.drawing`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Anatomy, Attention, Block, anatomy_of
from onnxpress.graph.anatomy.products import find_products
from onnxpress.graph.conventions import LAYERS, MERGED, ROTARY_TABLES
from onnxpress.graph.tensors import concrete_shape, rows_of

EXPORT_KEY = "structure"
"""Key under which an artifact's `export` holds what was cut: `StructureChange.to_dict`."""


@dataclass(frozen=True)
class AttentionSizes:
    """The sizes of one attention."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        count = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{count} heads × {self.head_dim}"


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one layer."""

    origin: int
    """Its index before layers were dropped."""
    attentions: tuple[AttentionSizes, ...]
    """Self-attention, then cross-attention; those whose sizes the graph does not tell are left out."""
    width: int | None
    """Features inside of the feed-forward network; None for experts and the like."""
    parameters: int = 0
    """Elements of the weights that it reads."""
    merged: tuple[int, ...] = ()
    """Original indices of the layers whose weights were added to its own."""

    @property
    def sizes(self) -> str:
        """`8 heads × 64, FFN 1536`"""
        parts = [str(one) for one in dict.fromkeys(self.attentions)]
        return ", ".join([*parts, *([f"FFN {self.width}"] if self.width is not None else [])]) or "–"


@dataclass(frozen=True)
class Structure:
    """The sizes of a transformer: its stacks of layers and what is outside of them."""

    stacks: Mapping[str, tuple[LayerSizes, ...]]
    """By path: `model.layers`."""
    hidden: Mapping[str, int | None]
    """Features of the hidden states of each stack; None where they differ between its layers."""
    vocabulary: int | None
    """Rows of the table that tokens are looked up in."""
    parameters: int
    frequencies: tuple[tuple[float, ...], ...] = ()
    """The angles of each table of rotations, radians per position, one for each plane."""
    scales: frozenset[float] = frozenset()
    """Factors of the scores of attention; empty where attention is decomposed."""
    names: frozenset[str] = frozenset()
    """Names of the weights and biases of all products but the head."""
    tied: bool = False
    """Whether the head multiplies by an embedding table."""
    norms: frozenset[str] = frozenset()
    """Kinds of norms in the layers: `LayerNorm`, `RMS norm`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the sizes that are recorded."""
        return {
            "parameters": self.parameters,
            "vocabulary": self.vocabulary,
            "hidden": dict(self.hidden),
            "stacks": {stack: [asdict(layer) for layer in layers] for stack, layers in self.stacks.items()},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Structure:
        """Read what `to_dict` wrote."""
        stacks = {
            stack: tuple(
                LayerSizes(
                    layer["origin"],
                    tuple(AttentionSizes(**heads) for heads in layer["attentions"]),
                    layer["width"],
                    layer.get("parameters", 0),
                    tuple(layer.get("merged", ())),
                )
                for layer in layers
            )
            for stack, layers in record["stacks"].items()
        }
        return cls(stacks, record["hidden"], record["vocabulary"], record["parameters"])


@dataclass(frozen=True)
class StructureChange:
    """The structure before and after all cuts since the export, and what of it no configuration can say."""

    before: Structure
    after: Structure
    onnx_only: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as artifact.json holds it."""
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "onnx_only": list(self.onnx_only)}

    @classmethod
    def of(cls, export: Mapping[str, Any]) -> StructureChange | None:
        """Read the change from the `export` of an artifact; None if nothing was cut."""
        record = export.get(EXPORT_KEY)
        if record is None:
            return None
        before, after = Structure.from_dict(record["before"]), Structure.from_dict(record["after"])
        return cls(before, after, tuple(record["onnx_only"]))


def read_structure(graphs: Iterable[ir.Model]) -> Structure | None:
    """Read the structure of a model of one or several graphs; None where no layers are recognised.

    Of the two decoders of an encoder-decoder the first counts: the other takes keys and values from the cache.
    """
    stacks: dict[str, tuple[LayerSizes, ...]] = {}
    hidden: dict[str, int | None] = {}
    frequencies: set[tuple[float, ...]] = set()
    scales: set[float] = set()
    weights: dict[str, int] = {}
    names: set[str] = set()
    norms: set[str] = set()
    vocabulary: int | None = None
    tied = False
    for model in graphs:
        try:
            anatomy = anatomy_of(model)
        except UnsupportedModelError:
            return None
        origins, merges = (json.loads(model.metadata_props.get(key, "{}")) for key in (LAYERS, MERGED))
        for stack, blocks in _stacks(anatomy).items():
            origin = origins.get(stack, range(len(blocks)))
            merged = merges.get(stack, {})
            layers = tuple(
                _layer(index, block, merged.get(str(index), ())) for index, block in zip(origin, blocks, strict=True)
            )
            stacks.setdefault(stack, layers)
            widths = {width for block in blocks for width in _hidden_widths(block)}
            hidden.setdefault(stack, widths.pop() if len(widths) == 1 else None)
            for block in blocks:
                norms |= {"RMS norm" if _is_rms(node) else "LayerNorm" for node in block.norms}
                for attention in block.attentions:
                    frequencies |= set(_frequencies(attention))
                    scales |= set(_scale(attention))
        vocabulary = _vocabulary(anatomy) if vocabulary is None else vocabulary
        weights |= _weights(model.graph.initializers.values())
        tied |= anatomy.tied
        for product in find_products(model.graph):
            if anatomy.head is None or product.node is not anatomy.head.node:
                names |= {product.name, *([str(product.bias.name)] if product.bias is not None else [])}
    parameters, tables = sum(weights.values()), tuple(sorted(frequencies))
    return Structure(
        stacks, hidden, vocabulary, parameters, tables, frozenset(scales), frozenset(names), tied, frozenset(norms)
    )


def _stacks(anatomy: Anatomy) -> dict[str, list[Block]]:
    stacks: dict[str, list[Block]] = {}
    for block in anatomy.blocks:
        stacks.setdefault(block.title.rpartition(".")[0], []).append(block)
    return stacks


def _layer(origin: int, block: Block, merged: Iterable[int]) -> LayerSizes:
    attentions = tuple(
        AttentionSizes(attention.heads, attention.kv_heads or attention.heads, attention.head_dim)
        for attention in block.attentions
        if attention.heads is not None and attention.head_dim is not None
    )
    width = block.feed_forward.down.features[0] if block.feed_forward else None
    return LayerSizes(origin, attentions, width, sum(_weights(_read_by(block)).values()), tuple(merged))


def _read_by(block: Block) -> Iterator[ir.Value]:
    """Yield the weights of a layer, also through nodes that only turn or cast them."""
    pending = [value for node in block.nodes for value in node.inputs if value is not None]
    while pending:
        value = pending.pop()
        maker = value.producer()
        if value.is_initializer():
            yield value
        elif maker is not None and maker.op_type in ("Transpose", "Cast") and maker not in block.nodes:
            pending += [one for one in maker.inputs if one is not None and one.is_initializer()]


def _is_rms(norm: ir.Node) -> bool:
    return "Simplified" in norm.op_type or norm.op_type.startswith("RMS")


def _hidden_widths(block: Block) -> Iterator[int]:
    for attention in block.attentions:
        if attention.output is not None:
            yield attention.output.features[1]
    if block.feed_forward is not None:
        yield block.feed_forward.down.features[1]


def _frequencies(attention: Attention) -> Iterator[tuple[float, ...]]:
    """Yield the frequencies of tables [positions, planes], whose row 1 is the angle of one position."""
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
    """Count the rows of the table whose indices are a graph input called …input_ids, as they are or reshaped."""
    for table in anatomy.embeddings:
        value = table.node.inputs[1]
        while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Cast", "Reshape"):
            value = maker.inputs[0]
        if value is not None and value.is_graph_input() and str(value.name).endswith("input_ids"):
            tensor = table.weight.const_value
            return concrete_shape(tensor)[0] if tensor is not None else None
    return None


def _weights(values: Iterable[ir.Value]) -> dict[str, int]:
    """Count the elements of each floating-point weight."""
    return {
        str(value.name): math.prod(concrete_shape(value.const_value))
        for value in values
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.size > 1
        and not str(value.name).endswith(ROTARY_TABLES)
    }
