"""Queries, keys and values that are packed head by head, taken apart before heads are moved in front of tokens.

    Slice(Transpose(Reshape(p, [batch, length, heads, 3 · size])), thirds of the last axis)
    =>  Split(Reshape(p, …)), and for each third Reshape to [batch, length, heads · size], Reshape, Transpose

p [batch, length, heads · 3 · size] is a product in which the query, the key and the value of a head stand side by side,
as in GPT-NeoX. Afterwards each of the three is split into heads as it is where it has a product of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.graph.matching import is_op, producer, slice_bounds
from onnxpress.graph.report import Report
from onnxpress.graph.sizes import size_of
from onnxpress.optimizers.fusion.decomposed.split_heads import SPLIT, is_order

PACKED = 3
"""Query, key and value."""


def split_packed_heads(graph: ir.Graph, report: Report) -> None:
    """Replace what matches; leaves dead nodes behind. Wants shapes to be known."""
    for node in list(graph):
        reshape = producer(node.inputs[0], "Reshape") if is_order(node, SPLIT) else None
        if reshape is not None and _split(graph, reshape, node):
            report.match("heads packed side by side")


def _split(graph: ir.Graph, reshape: ir.Node, transpose: ir.Node) -> bool:
    packed, heads = reshape.inputs[0], reshape.outputs[0]
    if packed is None or packed.shape is None or heads.shape is None or (len(packed.shape), len(heads.shape)) != (3, 4):
        return False
    rows = [size_of(packed, -3), size_of(packed, -2)]
    width, inner = size_of(packed, -1), size_of(heads, -1)
    if None in rows or rows != [size_of(heads, -4), size_of(heads, -3)]:
        return False
    if not isinstance(width, int) or not isinstance(inner, int) or not inner or width % inner or inner % PACKED:
        return False
    pieces = _pieces(transpose.outputs[0], inner)
    if pieces is None:
        return False
    nodes, made = _taken_apart(packed, width // inner, inner // PACKED)
    for node in nodes:
        node.metadata_props.update(transpose.metadata_props)
    old = list(dict.fromkeys(piece.producer() for piece in pieces))
    ir.convenience.replace_nodes_and_values(graph, transpose, [one for one in old if one], nodes, pieces, made)
    return True


def _pieces(value: ir.Value, inner: int) -> list[ir.Value] | None:
    """The thirds of the last axis, if they are all that is read of [batch, heads, length, inner]."""
    readers = [use.node for use in value.uses()]
    size = inner // PACKED
    if value.is_graph_output() or len(readers) != PACKED or not all(is_op(node, "Slice") for node in readers):
        return None
    assert value.shape is not None
    bounds = {slice_bounds(node, value): node.outputs[0] for node in readers if node.inputs[0] is value}
    wanted = [(start, start + size) for start in range(0, inner, size)]
    return [bounds[one] for one in wanted] if set(bounds) == set(wanted) else None


def _taken_apart(packed: ir.Value, count: int, size: int) -> tuple[list[ir.Node], Sequence[ir.Value]]:
    """Nodes, not in the graph yet, and queries, keys and values [batch, count, length, size] of [batch, length, count ·
    3 · size]. No size is computed, so that whoever edits weights can follow their columns."""
    assert packed.shape is not None
    batch, length = packed.shape.dims[:2]

    def shaped(value: ir.Value, *sizes: int | ir.SymbolicDim) -> ir.Value:
        value.type, value.shape = packed.type, ir.Shape(sizes)
        return value

    def integers(numbers: list[int]) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))}))
        return nodes[-1].outputs[0]

    nodes: list[ir.Node] = []
    by_head, sizes = integers([0, 0, count, PACKED * size]), integers([size] * PACKED)
    flat, split = integers([0, 0, count * size]), integers([0, 0, count, size])
    heads = ir.node("Reshape", [packed, by_head])
    shaped(heads.outputs[0], batch, length, count, PACKED * size)
    parts = ir.node("Split", [heads.outputs[0], sizes], {"axis": 3}, num_outputs=PACKED)
    nodes += [heads, parts]
    made = []
    for part in parts.outputs:
        together = ir.node("Reshape", [shaped(part, batch, length, count, size), flat])
        apart = ir.node("Reshape", [shaped(together.outputs[0], batch, length, count * size), split])
        transposed = ir.node("Transpose", [shaped(apart.outputs[0], batch, length, count, size)], {"perm": list(SPLIT)})
        nodes += [together, apart, transposed]
        made.append(shaped(transposed.outputs[0], batch, count, length, size))
    return nodes, made
