"""Groups of products: the smallest parts of a graph that get a format of their own.

A group is the products that read one activation (query, key and value; gate and up), since they share its quantization,
together with whatever shares a weight with them: an embedding and the head that is tied to it are one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import onnx_ir as ir

from onnxpress.calibration.subgraphs import extract
from onnxpress.graph.linear import find_linears, matrix_shape
from onnxpress.optimizers.quantization.quantize_embedding import looks_up, tables

SMALLEST = 32
"""Products with fewer inputs or outputs are in no group: passes leave them alone."""


class Part(Protocol):
    """Nodes of a graph that are tried alone: a group, or a block (`block_cuts.CutCandidate`)."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> tuple[str, ...]:
        """Names of its matrices."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the values that it reads."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the values that it makes for others."""

    @property
    def parameters(self) -> int:
        """Numbers in its matrices."""


@dataclass(frozen=True)
class Group:
    """Nodes, by the values between which they lie."""

    weights: tuple[str, ...]
    """Names of its matrices."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    """(inputs, outputs) of each product, in order."""
    parameters: int
    """Numbers in its matrices."""
    table: tuple[int, int] | None = None
    """(rows, columns) of the table that it looks rows up in, if it does."""

    @property
    def name(self) -> str:
        """`model.layers.3.mlp.down_proj`: the first weight, as the checkpoint calls the module that it is of."""
        return self.weights[0].removesuffix(".weight")

    def with_shapes(self, shapes: Sequence[Sequence[int]]) -> Group:
        """Return the group with products of other shapes."""
        pairs = tuple((int(inputs), int(outputs)) for inputs, outputs in shapes)
        return replace(self, shapes=pairs, parameters=sum(inputs * outputs for inputs, outputs in pairs))


def find_groups(graph: ir.Graph) -> list[Group]:
    """Find all groups of a float graph, in the order in which they are complete."""
    order = {node: number for number, node in enumerate(graph)}
    joined: dict[object, list[ir.Node]] = {}
    members: dict[ir.Node, object] = {}

    def join(node: ir.Node, *keys: ir.Value) -> None:
        """Put a node into one group with all others that share a key."""
        merged = [node]
        for key in {members[other] for value in keys for other in known.get(value, ())}:
            merged += joined.pop(key)
        joined[node] = merged
        members.update(dict.fromkeys(merged, node))
        for value in keys:
            known.setdefault(value, []).append(node)

    known: dict[ir.Value, list[ir.Node]] = {}
    weights: dict[ir.Node, ir.Value] = {}
    shapes: dict[ir.Node, tuple[int, int]] = {}
    for table in tables(graph):
        for node, _ in table.uses():
            if looks_up(node) is table:
                weights[node] = table
                join(node, table)
    for linear in find_linears(graph):
        if min(linear.shape) >= SMALLEST:
            weights[linear.node], shapes[linear.node] = linear.weight, linear.shape
            join(linear.node, linear.activation, linear.weight)
    groups = []
    for nodes in joined.values():
        nodes.sort(key=order.__getitem__)
        looked_up = next((weights[node] for node in nodes if node not in shapes), None)
        groups.append(
            (
                order[nodes[-1]],
                Group(
                    weights=_names(weights[node] for node in nodes),
                    inputs=_names(_read(node, node in shapes) for node in nodes),
                    outputs=tuple(str(node.outputs[0].name) for node in nodes),
                    shapes=tuple(shapes[node] for node in nodes if node in shapes),
                    parameters=sum(
                        rows * columns for rows, columns in map(matrix_shape, {weights[node] for node in nodes})
                    ),
                    table=matrix_shape(looked_up) if looked_up is not None else None,
                ),
            )
        )
    return [group for _, group in sorted(groups, key=lambda pair: pair[0])]


def part_model(model: ir.Model, part: Part, types: Mapping[str, ir.DataType] | None = None) -> ir.Model:
    """Take a part out as a graph of its own; weights stay lazy, and shapes of inputs known.

    Args:
        types: of its inputs, where the graph does not tell them.
    """
    values = {str(value.name): value for value in model.graph.inputs}
    values |= {str(value.name): value for node in model.graph for value in node.inputs if value is not None}
    known = types or {}
    inputs = {name: known.get(name) or values[name].dtype or ir.DataType.FLOAT for name in part.inputs}
    found = extract(model, inputs, part.outputs)
    for value in found.graph.inputs:
        original = values[str(value.name)]
        value.shape = original.shape
        if original.shape is not None and not original.is_graph_input():
            value.shape = ir.Shape([_size(original.shape, place) for place in range(len(original.shape))])
    return found


def _size(shape: ir.Shape, place: int) -> int | ir.SymbolicDim | None:
    """Return a size that a part may rely on: features, and heads or a single one where there are four dimensions.

    Other parts of the graph may know how long a sequence is; the part does not care.
    """
    size = shape[place]
    last = place == len(shape) - 1
    return size if last or (place == 1 and len(shape) == 4 and isinstance(size, int)) else None


def _read(node: ir.Node, is_product: bool) -> ir.Value:
    value = node.inputs[0 if is_product else 1]
    assert value is not None
    return value


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(value.name) for value in values))
