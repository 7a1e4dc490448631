"""Attention that torch's older exporter spells out, as com.microsoft MultiHeadAttention.

    softmax(scale · q kᵀ + mask) v   with q, k, v split into heads by Reshape and Transpose
    =>  MultiHeadAttention(q, k, v, attention_bias = mask)

q, k and v are the [batch, length, hidden] values before the split. The scale may stand on the product, or on q and k.
Where the graph guards against rows without a single visible key (torch's sdpa does, with IsNaN), the mask is kept
finite: such rows then hold an average instead of zeros, and nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.optimizers.base import Report
from onnxpress.optimizers.matching import (
    MICROSOFT,
    constant,
    is_op,
    only_reader,
    other_input,
    producer,
    scalar,
    use_microsoft_operators,
)

SPLIT = (0, 2, 1, 3)
LOWEST = float(np.finfo(np.float32).min) / 2


@dataclass(frozen=True)
class _Heads:
    """A value before it was split into heads."""

    source: ir.Value
    """[batch, length, heads · head_size]"""
    head_size: int
    scale: float


def fuse_attention(model: ir.Model, report: Report) -> None:
    """Replace what matches; leaves dead nodes behind."""
    masks: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if is_op(node, "Softmax"):
            reason = _fuse(model.graph, node, masks)
            if reason is None:
                report.match("MultiHeadAttention")
            else:
                report.skip(f"attention: {reason}")
    if masks or report.matched["MultiHeadAttention"]:
        use_microsoft_operators(model)


def _fuse(graph: ir.Graph, softmax: ir.Node, masks: dict[ir.Value, ir.Value]) -> str | None:
    """Fuse one attention, or say why not."""
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return "softmax is not over the last axis"
    probabilities, guarded = _past_nan_guard(softmax.outputs[0])
    mixed = only_reader(probabilities)
    if not is_op(mixed, "MatMul") or mixed is None or mixed.inputs[0] is not probabilities:
        return "no product with the values after the softmax"
    scores, scale, mask = _scores(softmax.inputs[0])
    if scores is None:
        return "no product of queries and keys before the softmax"
    query, key, value = _heads(scores.inputs[0]), _key_heads(scores.inputs[1]), _heads(mixed.inputs[1])
    if query is None or key is None or value is None:
        return "queries, keys or values are not split by Reshape and Transpose"
    if value.scale != 1:
        return "values are scaled"
    hidden = query.source.shape[-1] if query.source.shape is not None else None
    if not isinstance(hidden, int) or query.head_size != key.head_size or hidden % query.head_size:
        return "number of heads is not known"
    last = _merged(mixed, scores.inputs[0])
    if last is None:
        return "heads are not merged by Transpose and Reshape"
    bias = _attention_bias(graph, mask, query.source, scores, guarded, masks) if mask is not None else None
    inputs = [query.source, key.source, value.source, *([None, None, bias] if bias is not None else [])]
    fused = ir.node(
        "MultiHeadAttention",
        inputs,
        {"num_heads": hidden // query.head_size, "scale": scale * query.scale * key.scale},
        domain=MICROSOFT,
        name=f"{softmax.name}.attention" if softmax.name else None,
    )
    fused.metadata_props.update(softmax.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, last, [last], [fused], [last.outputs[0]], [fused.outputs[0]])
    return None


def _past_nan_guard(value: ir.Value) -> tuple[ir.Value, bool]:
    """The value after Where(IsNaN(p), 0, p), if that is what reads `value`."""
    readers = [use.node for use in value.uses()]
    test = next((node for node in readers if is_op(node, "IsNaN")), None)
    where = only_reader(test.outputs[0]) if test is not None else None
    if where is not None and is_op(where, "Where") and where.inputs[2] is value and scalar(where.inputs[1]) == 0:
        return where.outputs[0], True
    return value, False


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The value before a multiplication or division by a constant, and the factor."""
    for op_type in ("Mul", "Div"):
        node = producer(value, op_type)
        if node is None:
            continue
        factor = scalar(node.inputs[1])
        if factor:
            return node.inputs[0], factor if op_type == "Mul" else 1 / factor
        factor = scalar(node.inputs[0])
        if factor and op_type == "Mul":
            return node.inputs[1], factor
    return value, 1.0


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, float, ir.Value | None]:
    """The product of queries and keys, its scale, and the mask that is added to it."""
    add = producer(value, "Add")
    for operand in add.inputs if add is not None else [value]:
        product, scale = _unscaled(operand)
        node = producer(product, "MatMul")
        if node is not None and operand is not None:
            return node, scale, other_input(add, operand) if add is not None else None
    return None, 1.0, None


def _heads(value: ir.Value | None) -> _Heads | None:
    """What [batch, heads, length, head_size] was split from."""
    value, scale = _unscaled(value)
    return _split(producer(value, "Transpose"), SPLIT, scale)


def _key_heads(value: ir.Value | None) -> _Heads | None:
    """What transposed keys [batch, heads, head_size, length] were split from."""
    value, scale = _unscaled(value)
    transpose = producer(value, "Transpose")
    if transpose is not None and tuple(transpose.attributes.get_ints("perm", ())) == (0, 1, 3, 2):
        inner, more = _unscaled(transpose.inputs[0])
        return _split(producer(inner, "Transpose"), SPLIT, scale * more)
    return _split(transpose, (0, 2, 3, 1), scale)


def _split(transpose: ir.Node | None, order: tuple[int, ...], scale: float) -> _Heads | None:
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != order:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0] is None or reshape.inputs[0].shape is None:
        return None
    split = reshape.outputs[0].shape
    size = split[-1] if split is not None else None
    if len(reshape.inputs[0].shape) != 3 or split is None or len(split) != 4 or not isinstance(size, int):
        return None
    return _Heads(reshape.inputs[0], size, scale)


def _merged(mixed: ir.Node, query: ir.Value | None) -> ir.Node | None:
    """The Reshape to [batch, length, hidden] that ends the attention."""
    node = next((use.node for use in mixed.outputs[0].uses() if use.node.op_type in ("Transpose", "Reshape")), None)
    if is_op(node, "Reshape") and node is not None:  # torch repeats the shape [batch, heads, length, head_size]
        sizes = producer(node.inputs[1], "Concat")
        if sizes is None or len(sizes.inputs) != 4 or _dimension(sizes.inputs[2], query) not in (2, -2):
            return None
        node = only_reader(node.outputs[0])
    if node is None or not is_op(node, "Transpose") or tuple(node.attributes.get_ints("perm", ())) != SPLIT:
        return None
    readers = [use.node for use in node.outputs[0].uses() if not is_op(use.node, "Shape")]
    if len(readers) != 1 or not is_op(readers[0], "Reshape") or node.outputs[0].is_graph_output():
        return None
    reshape = readers[0]
    target = reshape.inputs[1]
    rank = len(reshape.outputs[0].shape) if reshape.outputs[0].shape is not None else None
    return reshape if target is not None and rank == 3 else None


def _dimension(value: ir.Value | None, query: ir.Value | None) -> int | None:
    """Which dimension of the queries a size was taken from."""
    unsqueeze = producer(value, "Unsqueeze")
    gather = producer(unsqueeze.inputs[0] if unsqueeze is not None else value, "Gather")
    shape = producer(gather.inputs[0], "Shape") if gather is not None else None
    index = constant(gather.inputs[1]) if gather is not None else None
    if shape is None or index is None or index.size != 1 or shape.inputs[0] is not _unscaled(query)[0]:
        return None
    return int(index.numpy().reshape(-1)[0])


def _attention_bias(
    graph: ir.Graph,
    mask: ir.Value,
    query: ir.Value,
    scores: ir.Node,
    guarded: bool,
    masks: dict[ir.Value, ir.Value],
) -> ir.Value:
    """The mask with as many rows as there are queries, and finite; made once for all layers."""
    if mask in masks:
        return masks[mask]
    one = ir.node("Constant", [], {"value_ints": [1]})
    rows = ir.node("Shape", [query], {"start": 1, "end": 2})
    ones = one.outputs[0]
    shape = ir.node("Concat", [ones, ones, rows.outputs[0], ones], {"axis": 0})
    nodes = [one, rows, shape, ir.node("Expand", [mask, shape.outputs[0]])]
    if guarded:
        lowest = ir.node("Constant", [], {"value_float": LOWEST})
        nodes += [lowest, ir.node("Max", [nodes[-1].outputs[0], lowest.outputs[0]])]
    graph.insert_before(scores, nodes)
    masks[mask] = nodes[-1].outputs[0]
    masks[mask].type = mask.type
    return masks[mask]
