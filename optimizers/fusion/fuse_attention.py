"""Attention that torch's older exporter decomposes, as com.microsoft MultiHeadAttention or GroupQueryAttention.

    softmax(scale · q kᵀ + mask) v   with q, k, v split into heads by Reshape and Transpose
    =>  MultiHeadAttention(q, k, v, attention_bias = mask, past)
    =>  GroupQueryAttention(q, k, v, past, lengths, attention_bias = mask)   where keys and values are repeated

q, k and v are the [batch, length, hidden] values before the split, or rotated ones; the operator appends them to the
past. The scale may stand on the product, or on q and k. The mask stays the graph's own. GroupQueryAttention hides later
tokens by itself, so there the mask must hide them as well.

Where the graph guards against rows without a single visible key (torch's sdpa does, with IsNaN), the mask is kept
finite: such rows then hold an average instead of zeros, and nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from onnxpress.graph.anatomy.roles import NOT_FUSED
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import use_microsoft_operators
from onnxpress.graph.matching import constant, is_op, only_reader, other_input, producer, scalar
from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.decomposed.bias import attention_bias, require_causal
from onnxpress.optimizers.fusion.decomposed.lengths import Lengths
from onnxpress.optimizers.fusion.decomposed.split_heads import (
    SPLIT,
    NotFused,
    SplitHeads,
    heads_of,
    is_order,
    key_heads_of,
    unscaled,
)


@dataclass(frozen=True)
class _Attention:
    """One that can be fused."""

    softmax: ir.Node
    scores: ir.Node
    mask: ir.Value | None
    query: SplitHeads
    key: SplitHeads
    value: SplitHeads
    scale: float
    guarded: bool
    """Rows without a visible key become zeros."""
    last: ir.Node
    """The Reshape to [batch, length, hidden] that ends it."""


@dataclass
class _Fusion:
    model: ir.Model
    lengths: Lengths
    masks: dict[ir.Value, ir.Value] = field(default_factory=dict)
    causal: dict[ir.Value, str | None] = field(default_factory=dict)
    """By mask, why it is not."""


def fuse_attention(model: ir.Model, report: Report) -> None:
    """Replace what matches; leaves dead nodes behind. Wants shapes to be known, and nodes and values to have names."""
    softmaxes = [node for node in model.graph if is_op(node, "Softmax")]
    fusion = _Fusion(model, Lengths(model.graph))
    for softmax in softmaxes:
        try:
            found = _match(softmax)
        except NotFused:
            continue
        fusion.lengths.replace(found.key)
        fusion.lengths.replace(found.value)
    if fusion.lengths.replaced:  # layers then build the same mask
        common.TopologicalSortPass()(model)
        common.CommonSubexpressionEliminationPass()(model)
    for softmax in softmaxes:
        try:
            _fuse(fusion, _match(softmax), report)
        except NotFused as reason:
            softmax.metadata_props[NOT_FUSED] = str(reason)
            report.skip(f"attention: {reason}")
    if report.matched["MultiHeadAttention"] or report.matched["GroupQueryAttention"]:
        use_microsoft_operators(model)


def _match(softmax: ir.Node) -> _Attention:
    """Raises NotFused with the reason."""
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise NotFused("softmax is not over the last axis")
    probabilities, guarded = _past_nan_guard(softmax.outputs[0])
    mixed = only_reader(probabilities)
    if not is_op(mixed, "MatMul") or mixed is None or mixed.inputs[0] is not probabilities:
        raise NotFused("no product with the values after the softmax")
    scores, scale, mask = _scores(softmax.inputs[0])
    if scores is None:
        raise NotFused("no product of queries and keys before the softmax")
    query, key = heads_of(scores.inputs[0], "queries"), key_heads_of(scores.inputs[1])
    value = heads_of(mixed.inputs[1], "values")
    if value.scale != 1:
        raise NotFused("values are scaled")
    if query.head_size != key.head_size or query.repeats != 1 or query.count != key.count * key.repeats:
        raise NotFused(f"{query.count} heads of queries, {key.count} of keys, each for {key.repeats}, do not fit")
    if query.past is not None or value.rotation is not None or key.repeats != value.repeats:
        raise NotFused("keys and values are not made alike")
    if (key.past is None) != (value.past is None) or key.count != value.count:
        raise NotFused("keys and values are not made alike")
    last = _merged(mixed, scores.inputs[0])
    if last is None:
        raise NotFused("heads are not merged by Transpose and Reshape")
    return _Attention(softmax, scores, mask, query, key, value, scale * query.scale * key.scale, guarded, last)


def _fuse(fusion: _Fusion, attention: _Attention, report: Report) -> None:
    """Put the operator in its place, or raise NotFused."""
    key, graph = attention.key, fusion.model.graph
    grouped = key.repeats > 1
    cache = [value.present for value in (key, attention.value) if value.present is not None]
    if attention.mask is not None and _depends(attention.mask, cache):
        raise NotFused("its mask depends on keys or values")
    if grouped:
        _check_groups(fusion, attention)
    inputs = [_rotated(graph, attention.scores, one) for one in (attention.query, key, attention.value)]
    bias = None
    if attention.mask is not None:
        if attention.mask not in fusion.masks:
            rows = fusion.lengths.size(attention.query.source, 1)
            fusion.masks[attention.mask] = attention_bias(
                graph, attention.mask, rows, attention.scores, attention.guarded
            )
        bias = fusion.masks[attention.mask]
    attributes: dict[str, Any] = {"num_heads": attention.query.count, "scale": attention.scale}
    past = [key.past, attention.value.past] if cache else [None, None]
    if grouped:
        attributes |= {"kv_num_heads": key.count}
        inputs += [*past, *fusion.lengths.of_all(key, attention.query), None, None, None, bias]
    else:
        inputs += [None, None, bias, *past]
    while inputs[-1] is None:
        inputs.pop()
    operator = "GroupQueryAttention" if grouped else "MultiHeadAttention"
    fused = ir.node(
        operator,
        inputs,
        attributes,
        domain=MICROSOFT,
        name=f"{attention.softmax.name}.attention" if attention.softmax.name else None,
        num_outputs=3 if cache or grouped else 1,
    )
    fused.metadata_props.update(attention.softmax.metadata_props)
    fused.metadata_props.pop(NOT_FUSED, None)
    last, merged = attention.last, attention.last.outputs[0]
    assert merged.shape is not None
    merged.shape = ir.Shape([*list(merged.shape)[:-1], attention.query.count * attention.value.head_size])
    concats = [one.producer() for one in cache]
    ir.convenience.replace_nodes_and_values(
        graph, last, [last], [fused], [merged, *cache], list(fused.outputs[: 1 + len(cache)])
    )
    graph.remove([node for node in concats if node is not None], safe=True)
    report.match(operator)


def _check_groups(fusion: _Fusion, attention: _Attention) -> None:
    """Raise NotFused where GroupQueryAttention would do something else."""
    if attention.query.head_size % 8:
        raise NotFused(f"GroupQueryAttention takes heads of multiples of 8, not {attention.query.head_size}")
    if attention.mask is None:
        raise NotFused("its keys are repeated, and it has no mask that hides later tokens")
    if attention.mask not in fusion.causal:
        fusion.causal[attention.mask] = None
        try:
            require_causal(fusion.model, attention.mask)
        except NotFused as error:
            fusion.causal[attention.mask] = str(error)
    reason = fusion.causal[attention.mask]
    if reason is not None:
        raise NotFused(reason)


def _rotated(graph: ir.Graph, before: ir.Node, heads: SplitHeads) -> ir.Value | None:
    """[batch, length, heads · head_size], rotated as the heads were."""
    if heads.rotation is None:
        return heads.source
    old = heads.rotation
    attributes = [one for one in old.attributes.values() if one.name != "num_heads"]
    attributes.append(ir.AttrInt64("num_heads", heads.count))
    node = ir.Node(MICROSOFT, "RotaryEmbedding", [heads.source, *old.inputs[1:]], attributes, name=old.name)
    node.metadata_props.update(old.metadata_props)
    node.outputs[0].type, node.outputs[0].shape = heads.source.type, heads.source.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _depends(value: ir.Value, others: list[ir.Value]) -> bool:
    queue: list[ir.Value | None] = [value]
    seen = set()
    while queue:
        current = queue.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if current in others:
            return True
        node = current.producer()
        queue += node.inputs if node is not None else []
    return False


def _past_nan_guard(value: ir.Value) -> tuple[ir.Value, bool]:
    """The value after Where(IsNaN(p), 0, p), if that is what reads `value`."""
    readers = [use.node for use in value.uses()]
    test = next((node for node in readers if is_op(node, "IsNaN")), None)
    where = only_reader(test.outputs[0]) if test is not None else None
    if where is not None and is_op(where, "Where") and where.inputs[2] is value and scalar(where.inputs[1]) == 0:
        return where.outputs[0], True
    return value, False


def _scores(value: ir.Value | None) -> tuple[ir.Node | None, float, ir.Value | None]:
    """The product of queries and keys, its scale, and the mask that is added to it."""
    add = producer(value, "Add")
    for operand in add.inputs if add is not None else [value]:
        product, scale = unscaled(operand)
        node = producer(product, "MatMul")
        if node is not None and operand is not None:
            return node, scale, other_input(add, operand) if add is not None else None
    return None, 1.0, None


def _merged(mixed: ir.Node, query: ir.Value | None) -> ir.Node | None:
    """The Reshape to [batch, length, hidden] that ends the attention."""
    node = next((use.node for use in mixed.outputs[0].uses() if use.node.op_type in ("Transpose", "Reshape")), None)
    if is_op(node, "Reshape") and node is not None:  # torch repeats the shape [batch, heads, length, head_size]
        sizes = producer(node.inputs[1], "Concat")
        if sizes is None or len(sizes.inputs) != 4 or _dimension(sizes.inputs[2], query) not in (2, -2):
            return None
        node = only_reader(node.outputs[0])
    if node is None or not is_order(node, SPLIT):
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
    if shape is None or index is None or index.size != 1 or shape.inputs[0] is not unscaled(query)[0]:
        return None
    return int(index.numpy().reshape(-1)[0])
