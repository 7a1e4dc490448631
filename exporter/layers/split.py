"""A graph of a few traced layers, taken apart: prologue, layers, epilogue, and the values that cross their edges."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxpress.graph.conventions import MODULE

PROLOGUE, EPILOGUE = -1, 1 << 30


class CannotReplicate(Exception):
    """The traced layers do not say what flows where; `retry` tells whether one more traced layer would."""

    def __init__(self, reason: str, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


@dataclass
class LayerNodes:
    """The nodes of a layer, of the prologue or of the epilogue."""

    nodes: list[ir.Node] = field(default_factory=list)
    crossing: list[ir.Value] = field(default_factory=list)
    """Values of earlier traced layers (or, for the first layer, of the prologue) that its nodes use."""


def rename_layers(traced: ir.Model, path: str, chosen: tuple[int, ...]) -> None:
    """Traced layers are numbered 0, 1, …; give them their number in the full model, in parameters and module names."""
    pattern = re.compile(rf"^{re.escape(path)}\.(\d+)(?=\.|$)")

    def renamed(name: str) -> str:
        return pattern.sub(lambda found: f"{path}.{chosen[int(found[1])]}", name)

    values = list(traced.graph.initializers.values())
    for value in values:
        traced.graph.initializers.pop(value.name or "")
    for value in values:
        value.name = renamed(value.name or "")
        traced.graph.initializers.add(value)
    for node in traced.graph:
        if MODULE in node.metadata_props:
            node.metadata_props[MODULE] = renamed(node.metadata_props[MODULE])


def partition(traced: ir.Model, path: str, chosen: tuple[int, ...]) -> dict[int, LayerNodes]:
    """Sort nodes into prologue, layers and epilogue, by what they depend on."""
    pattern = re.compile(rf"^{re.escape(path)}\.(\d+)(?=\.|$)")
    place: dict[ir.Node, int] = {}
    layers: dict[int, LayerNodes] = {
        PROLOGUE: LayerNodes(),
        EPILOGUE: LayerNodes(),
        **{index: LayerNodes() for index in chosen},
    }

    def layer_of_name(name: str | None) -> int | None:
        found = pattern.match(name or "") or re.match(r"^past_key_values\.(\d+)\.", name or "")
        return int(found[1]) if found else None

    for node in traced.graph:
        sources = [value for value in node.inputs if value is not None]
        below = [place[producer] for value in sources if (producer := value.producer()) is not None]
        # the shape of a cache is the same in every layer
        own = {
            index for value in sources if (index := layer_of_name(value.name)) is not None and node.op_type != "Shape"
        }
        if any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values()):
            raise CannotReplicate(f"{node.op_type} has a subgraph")
        scope = layer_of_name(node.metadata_props.get(MODULE))
        depends = max([*below, *own, PROLOGUE])
        if scope is not None and scope in layers and depends <= scope:
            # what a layer computes from the prologue alone is shared, unless it is part of its main path
            where = scope if depends != PROLOGUE or _on_main_path(node) else PROLOGUE
        elif depends in (PROLOGUE, EPILOGUE):
            where = depends
        else:
            where = EPILOGUE if depends == chosen[-1] else depends
        if own and max(own) > where:
            raise CannotReplicate(f"{node.op_type} mixes parameters of several layers")
        place[node] = where
        layers[where].nodes.append(node)
    for index in chosen:
        inside = {output for node in layers[index].nodes for output in node.outputs}
        seen: dict[ir.Value, None] = {}
        for node in layers[index].nodes:
            for value in node.inputs:
                if value is None or value in inside:
                    continue
                producer = value.producer()
                if producer is not None and (place[producer] != PROLOGUE or index == chosen[0]):
                    seen.setdefault(value)
        layers[index].crossing = list(seen)
    return layers


def _on_main_path(node: ir.Node) -> bool:
    """A node of the first layer fed by the prologue alone: its main path starts from the embedding, a float tensor of
    the length of the text; shapes and constants are not of it."""
    return any(
        output.dtype in {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        and output.shape is not None
        and len(output.shape) == 3
        for output in node.outputs
    )


def flows(
    layers: list[LayerNodes], chosen: tuple[int, ...]
) -> tuple[dict[int, list[ir.Value]], dict[int, list[ir.Value]]]:
    """For each traced layer after the first: the values that it takes from the layer before it, in order of use, and
    those it takes from a certain earlier layer."""
    made_by = {
        output: position for position, layer in enumerate(layers) for node in layer.nodes for output in node.outputs
    }
    chain: dict[int, list[ir.Value]] = {}
    fixed: dict[int, list[ir.Value]] = {}
    for position, layer in enumerate(layers):
        if position == 0:
            continue
        before = [value for value in layer.crossing if made_by.get(value) == position - 1]
        earlier = [value for value in layer.crossing if made_by.get(value, position - 1) < position - 1]
        if position == 1 and len(before) > 1:
            # either a chain of several values or something that layer 0 alone makes: a second copy tells
            if len(layers) == 2:
                raise CannotReplicate("several values flow from the first layer to the second", retry=True)
            later = set(layers[2].crossing)
            earlier = [value for value in before if value in later]
            before = [value for value in before if value not in later]
        chain[chosen[position]] = before
        fixed[chosen[position]] = earlier
    lengths = {len(values) for values in chain.values()}
    if len(lengths) > 1 or lengths == {0}:
        raise CannotReplicate("the layers do not pass on the same number of values")
    return chain, fixed


def representatives(signatures: tuple[int, ...], chosen: tuple[int, ...]) -> list[int]:
    """For each layer of the full model the traced layer that it copies: itself if traced, otherwise the last traced one
    with its signature (the last has the least ambiguous edges)."""
    return [
        index if index in chosen else max(other for other in chosen[1:] if signatures[other] == signatures[index])
        for index in range(len(signatures))
    ]
