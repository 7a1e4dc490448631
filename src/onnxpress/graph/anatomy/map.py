"""Embeddings, blocks, norms and head of a transformer, each tied to its nodes and initializers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.graph.anatomy.layers import NORMS, Segment, split_layers
from onnxpress.graph.anatomy.products import Product, find_products
from onnxpress.graph.anatomy.roles import Attention, FeedForward, find_attentions, find_feed_forward
from onnxpress.graph.tensors import concrete_shape

__all__ = ["Anatomy", "Attention", "Block", "Embedding", "FeedForward", "anatomy_of"]

_VIEWS = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"})
"""Operators that a table may pass on its way to the lookup: codes are dequantized, or seen in another shape."""


@dataclass(frozen=True)
class Embedding:
    """A table [rows, width] (or its codes) that is looked up before the layers: of tokens, positions or types."""

    node: ir.Node
    weight: ir.Value


@dataclass(frozen=True)
class Block:
    """One transformer layer."""

    segment: Segment
    inputs: tuple[ir.Value, ...]
    """The values that it reads from outside: hidden states, masks, positions, rotary tables, the cache."""
    hidden: tuple[ir.Value, ...]
    """The inputs that are hidden states of the layer before, or the embeddings for the first; one value, or two where
    the first norm also adds the residual."""
    outputs: tuple[ir.Value, ...]
    """The hidden states that it hands on."""
    products: tuple[Product, ...]
    norms: tuple[ir.Node, ...]
    attentions: tuple[Attention, ...]
    """Self-attention, then cross-attention where the layer has one."""
    feed_forward: FeedForward | None
    """None for experts and whatever else is no plain feed-forward."""

    @property
    def title(self) -> str:
        return self.segment.title

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return self.segment.nodes


@dataclass(frozen=True)
class Anatomy:
    """A transformer in a graph."""

    segments: tuple[Segment, ...]
    """All nodes, in an order in which they can run."""
    blocks: tuple[Block, ...]
    """Those of all stacks of layers, in the order of `segments`."""
    embeddings: tuple[Embedding, ...]
    final_norms: tuple[ir.Node, ...]
    head: Product | None
    """The product that makes `logits`."""

    @property
    def tied(self) -> bool:
        """Whether the head multiplies by an embedding table."""
        return self.head is not None and any(table.weight is self.head.weight for table in self.embeddings)


def anatomy_of(model: ir.Model) -> Anatomy:
    """The anatomy of a graph. Raises UnsupportedModelError with the reason where no layers are found."""
    segments = split_layers(model.graph)
    made = {
        output: number for number, segment in enumerate(segments) for node in segment.nodes for output in node.outputs
    }
    layers = [number for number, segment in enumerate(segments) if segment.layer is not None]
    inputs = {number: segments[number].inputs() for number in layers}
    blocks = []
    for number in layers:
        hidden = _hidden(segments, inputs, made, number)
        outputs = (
            _hidden(segments, inputs, made, number + 1)
            if number + 1 in inputs
            else tuple(
                value for value in segments[number + 1].inputs() if made.get(value) == number and _is_states(value)
            )
            or tuple(value for node in segments[number].nodes for value in node.outputs if _is_states_output(value))
        )
        products = tuple(find_products(segments[number].nodes))
        attentions = find_attentions(segments[number].nodes, products)
        # By weight: DeBERTa's projections read relative positions as well.
        used = {product.weight for one in attentions for product in one.products}
        rest = [product for product in products if product.weight not in used]
        blocks.append(
            Block(
                segments[number],
                tuple(inputs[number]),
                hidden,
                outputs,
                products,
                tuple(node for node in segments[number].nodes if node.op_type in NORMS),
                attentions,
                find_feed_forward(segments[number].nodes, rest),
            )
        )
    outside = [node for segment in segments if segment.layer is None for node in segment.nodes]
    after = [node for segment in segments[1:] if segment.layer is None for node in segment.nodes]
    return Anatomy(
        tuple(segments),
        tuple(blocks),
        tuple(_embeddings(outside)),
        tuple(node for node in after if node.op_type in NORMS),
        _head(model.graph, list(find_products(after))),
    )


def _hidden(
    segments: Sequence[Segment], inputs: dict[int, list[ir.Value]], made: dict[ir.Value, int], number: int
) -> tuple[ir.Value, ...]:
    """The hidden states that segment `number` reads.

    Of what the segment before made, all but what a later layer reads as well, such as T5's position bias; a first layer
    reads masks and tables, too, which no norm, product or sum of the layer takes.
    """
    elsewhere = {value for other, values in inputs.items() if other > number for value in values}
    if segments[number - 1].layer is not None:
        candidates = [value for value in inputs[number] if made.get(value) == number - 1]
        main = [value for value in candidates if value not in elsewhere]
    else:
        inside = set(segments[number].nodes)
        candidates = [value for value in inputs[number] if made.get(value, 0) < number and _is_states(value)]
        main = [
            value
            for value in candidates
            if any(_takes_states(user, value) for user in inside.intersection(value.consumers()))
        ]
        main = [value for value in main if value not in elsewhere] or main
    return tuple(main or candidates)


def _is_states(value: ir.Value) -> bool:
    floating = value.dtype is None or value.dtype.is_floating_point()
    return floating and (value.shape is None or len(value.shape) in (2, 3))


def _takes_states(node: ir.Node, value: ir.Value) -> bool:
    if node.op_type in NORMS:
        return node.inputs[0] is value or node.op_type.startswith("Skip")
    return any(product.activation is value for product in find_products([node])) or (
        node.op_type == "Add"
        and any(other is not value and other is not None and not other.is_initializer() for other in node.inputs)
    )


def _is_states_output(value: ir.Value) -> bool:
    return value.is_graph_output() and not (value.name or "").startswith("present")


def _embeddings(nodes: Sequence[ir.Node]) -> list[Embedding]:
    found = []
    for node in nodes:
        if node.op_type not in ("Gather", "GatherBlockQuantized") or node.inputs[0] is None:
            continue
        table: ir.Value = node.inputs[0]
        while (maker := table.producer()) is not None and maker.op_type in _VIEWS and maker.inputs[0] is not None:
            table = maker.inputs[0]
        tensor = table.const_value
        rank = 0 if tensor is None else len(concrete_shape(tensor))
        if table.is_initializer() and (rank == 2 or (rank == 3 and node.op_type == "GatherBlockQuantized")):
            found.append(Embedding(node, table))
    return found


def _head(graph: ir.Graph, products: Sequence[Product]) -> Product | None:
    """The last product before the output called logits."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    by_output = {product.output: product for product in products} | {
        product.node.outputs[0]: product for product in products
    }
    value: ir.Value | None = logits
    while value is not None:
        if value in by_output:
            return by_output[value]
        node = value.producer()
        value = (
            next((one for one in node.inputs if one is not None and not one.is_initializer()), None) if node else None
        )
    return None
