"""Which part of a transformer each node of a graph belongs to.

A graph is cut into segments that run one after another: what comes before the layers (embeddings, masks, positions),
one segment a layer, and what comes after the last of them (final norm, head, pooling). A graph with two stacks of
layers, such as CLIP's text and vision models, has a segment after each.

The evidence is, in this order: a node reads weights named after a layer (`model.layers.3.…`, `encoder.block.3.…`,
`h.3.…`), through transposes and dequantization; the module that exporters record for a node, or its name; what it
depends on. Nothing is assumed about operators, so the same holds for fp32, packed, smoothed and quantized graphs.
Numbers and shapes are no evidence: an exporter names them after the layer that wants them first, and others read them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.conventions import MODULE, layer_of
from onnxpress.graph.linear import PARTS

TORCH_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter records the modules around a node and the node, outermost first, as a Python list."""
_SCOPES = re.compile(r"'([^']*)'")
NORMS = frozenset(
    {
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)

QUANTIZERS = frozenset({"Abs", "Div", "DynamicQuantizeLinear", "Max", "QuantizeLinear", "ReduceMax"})
"""Operators that prepare an activation for an integer product; they go with it, as nodes named after parts do."""


@dataclass(frozen=True)
class Segment:
    """A run of nodes between two boundaries."""

    title: str
    """`model.layers.3`, `before model.layers` or `after model.layers`."""
    layer: int | None
    """Index of the layer within its stack; None before and after a stack."""
    nodes: tuple[ir.Node, ...]
    """In graph order."""

    def inputs(self) -> list[ir.Value]:
        """Values that it reads from outside, in order of use: inputs and values of earlier segments, no weights."""
        inside = {output for node in self.nodes for output in node.outputs}
        seen: dict[ir.Value, None] = {}
        for node in self.nodes:
            for value in _read(node):
                if value not in inside and not _is_weight(value):
                    seen.setdefault(value)
        return list(seen)


def split_layers(graph: ir.Graph) -> list[Segment]:
    """The segments of `graph`, in an order in which they can run; every node is in exactly one.

    Raises UnsupportedModelError with the reason where a graph has no layers, or none that run one after another.
    """
    stacks = _stacks(graph)
    if not stacks:
        raise UnsupportedModelError(
            "no transformer layers were recognised: no weight or node is named after one (model.layers.0.…)"
        )
    # Segment 0 is before everything; a stack of n layers takes n segments and one after them.
    numbers: dict[tuple[str, int], int] = {}
    afters, count = set(), 1
    for stack, layers in stacks.items():
        numbers |= {(stack, layer): count + place for place, layer in enumerate(layers)}
        afters.add(count + len(layers))
        count += len(layers) + 1
    places = _Places(graph, numbers, afters).find()
    nodes: list[list[ir.Node]] = [[] for _ in range(count)]
    for node in graph:
        nodes[places[node]].append(node)
    segments = [Segment(f"before {next(iter(stacks))}", None, tuple(nodes[0]))]
    for stack, layers in stacks.items():
        segments += [Segment(f"{stack}.{i}", i, tuple(nodes[numbers[stack, i]])) for i in layers]
        segments.append(Segment(f"after {stack}", None, tuple(nodes[len(segments)])))
    empty = [segment.title for segment in segments if segment.layer is not None and not segment.nodes]
    if empty:
        raise UnsupportedModelError(f"{empty[0]} has weights but computes nothing: layers share what they compute")
    return segments


def scope_of(node: ir.Node) -> str | None:
    """The module that a node comes from: as exporters recorded it, or its name where that is a path."""
    name = node.metadata_props.get(MODULE)
    if name is not None:
        return name
    scopes = _SCOPES.findall(node.metadata_props.get(TORCH_SCOPES, ""))
    if scopes:
        return f"{scopes[-2]}.{scopes[-1]}" if len(scopes) > 1 else scopes[-1]
    return node.name if node.name and ("/" in node.name or "." in node.name) else None


def module_of(node: ir.Node) -> str | None:
    """The path of the module that a node comes from, with dots; None where exporters recorded none."""
    name = node.metadata_props.get(MODULE)
    if name is not None:
        return name
    scope = scope_of(node)
    if scope is None:
        return None
    return scope.rpartition("/")[0].strip("/").replace("/", ".") if "/" in scope else scope.rpartition(".")[0]


def _stacks(graph: ir.Graph) -> dict[str, list[int]]:
    """The layers of each stack by its path, in the order in which the graph first uses their weights.

    A layer has matrices: the genai builder calls the final norm one more layer. Where weights are not named after
    layers, as most are not in torch's exports, the modules of the nodes that read them tell. A part of a model may lack
    layers.
    """
    matrices = [(node, value) for node in graph for value in _read(node) if _is_weight(value) and _is_matrix(value)]
    by_name = _layers(layer_of(value.name) for _, value in matrices)
    by_scope = _layers(layer_of(scope_of(node)) for node, _ in matrices)
    if not by_name:
        by_name, by_scope = by_scope, {}
    return {stack: sorted(layers | by_scope.get(stack, set())) for stack, layers in by_name.items()}


def _layers(found: Iterable[tuple[str, int] | None]) -> dict[str, set[int]]:
    stacks: dict[str, set[int]] = {}
    for layer in found:
        if layer is not None:
            stacks.setdefault(layer[0], set()).add(layer[1])
    return stacks


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and len(tensor.shape) > 1 and tensor.size > 1


def _is_number_or_shape(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and (tensor.size == 1 or tensor.dtype in (ir.DataType.INT64, ir.DataType.BOOL))


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, bodies of loops and branches included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = (
            (attribute.value,)
            if attribute.type == ir.AttributeType.GRAPH
            else attribute.value
            if attribute.type == ir.AttributeType.GRAPHS
            else ()
        )
        for body in graphs:
            inside = {*body.inputs, *body.initializers.values()}
            for inner in body:
                yield from (value for value in _read(inner) if value not in inside)
                inside.update(inner.outputs)


class _Places:
    """Finds the number of the segment of each node."""

    def __init__(self, graph: ir.Graph, numbers: Mapping[tuple[str, int], int], afters: set[int]) -> None:
        self.graph, self.numbers, self.afters = graph, numbers, afters
        self.places: dict[ir.Node, int] = {}
        self.sources: dict[ir.Value, frozenset[ir.Value]] = {}
        """The weights that a value is computed from, where it is from weights alone."""
        self.readers: dict[ir.Value, set[int]] = {}
        """Segments that read a weight, as far as the walk has come."""
        self.needed = self._needed_by_layers()

    def find(self) -> dict[ir.Node, int]:
        for node in self.graph:
            self.places[node] = self._place(node)
            for value in self._weights(node):
                self.readers.setdefault(value, set()).add(self.places[node])
        for node in reversed(self.graph):
            users = [self.places[user] for output in node.outputs for user, _ in output.uses() if user in self.places]
            prepares = node.op_type in QUANTIZERS or (node.name or "").endswith(PARTS)
            if prepares and users and not any(output.is_graph_output() for output in node.outputs):
                self.places[node] = max(self.places[node], min(users))
        return self.places

    def _needed_by_layers(self) -> set[ir.Node]:
        """Nodes that something with weights of a layer depends on; what lies behind the layers is not among them."""
        needed: set[ir.Node] = set()
        for node in reversed(self.graph):
            names = [value.name for value in _read(node) if _is_weight(value) and not _is_number_or_shape(value)]
            if any(_is_weight(value) and _is_matrix(value) for value in _read(node)):
                names.append(scope_of(node))
            own = any(self._number(layer_of(name)) is not None for name in names)
            if own or any(user in needed for output in node.outputs for user, _ in output.uses()):
                needed.add(node)
        return needed

    def _weights(self, node: ir.Node) -> frozenset[ir.Value]:
        """The weights that a node reads, directly or through nodes that read nothing else."""
        found: set[ir.Value] = set()
        for value in _read(node):
            found |= {value} if _is_weight(value) else self.sources.get(value, frozenset())
        return frozenset(found)

    def _place(self, node: ir.Node) -> int:
        weights = self._weights(node)
        named = [
            place
            for value in weights
            if not _is_number_or_shape(value) and (place := self._number(layer_of(value.name))) is not None
        ]
        values = [value for value in _read(node) if not _is_weight(value)]
        if all(value in self.sources for value in values):
            self.sources.update(dict.fromkeys(node.outputs, weights))
            return max(named, default=0)
        producers = [producer for value in values if (producer := value.producer()) is not None]
        below = max((self.places.get(producer, 0) for producer in producers), default=0)
        if named:
            if below > min(named):
                raise UnsupportedModelError(
                    f"layers share weights: {node.op_type} {node.name!r} reads those of one layer and what a later "
                    "one computes"
                )
            return max(named)
        scope = scope_of(node)
        wanted = self._number(layer_of(scope))
        if wanted is not None and wanted > below and (below or node.op_type in NORMS or self._has_own_matrix(weights)):
            return wanted
        if (
            below + 1 in self.afters
            and wanted is None
            and node not in self.needed
            and self._leaves(node, scope, weights)
        ):
            return below + 1
        return below

    def _number(self, layer: tuple[str, int] | None) -> int | None:
        return None if layer is None else self.numbers.get(layer)

    def _has_own_matrix(self, weights: frozenset[ir.Value]) -> bool:
        return any(not _is_number_or_shape(value) and value not in self.readers for value in weights)

    def _leaves(self, node: ir.Node, scope: str | None, weights: frozenset[ir.Value]) -> bool:
        """Whether a node that depends on the last layer lies behind it."""
        if self._has_own_matrix(weights):
            return True
        # Tracing gives the sum that ends the last layer, and the scaling before it, to the module around the layers.
        residual = (node.op_type == "Add" and not weights) or (node.op_type == "Mul" and len(weights) == 1)
        return scope is not None and not residual
