"""Queries, keys and values of decomposed attention: what they were before they were split into heads.

q    [batch, length, hidden] -> Reshape -> Transpose (-> RotaryEmbedding)
k, v likewise, then appended to the past (Concat), repeated for groups of queries (Unsqueeze, Expand, Reshape); keys
     are transposed. Constant factors may stand on queries and on what is read of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxpress.graph.anatomy.layers import NORMS
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.matching import constant, is_op, producer, scalar, slice_bounds
from onnxpress.graph.sizes import size_of, sizes_in

SPLIT = (0, 2, 1, 3)
KEYS = (0, 2, 3, 1)
TRANSPOSED = (0, 1, 3, 2)


class NotFused(Exception):
    """Says why an attention is left as it is."""


@dataclass(frozen=True)
class SplitHeads:
    """A value before it was split into heads."""

    source: ir.Value
    """[batch, length, heads · head_size], before any rotation"""
    head_size: int
    count: int
    scale: float = 1.0
    rotation: ir.Node | None = None
    """RotaryEmbedding of [batch, heads, length, head_size]"""
    past: ir.Value | None = None
    """[batch, heads, past length, head_size]"""
    present: ir.Value | None = None
    """The past and what is new."""
    repeats: int = 1
    """How often each head stands side by side for as many heads of queries."""
    views: tuple[ir.Value, ...] = ()
    """Values as long as the present, which graphs ask for their length."""


def heads_of(value: ir.Value | None, what: str) -> SplitHeads:
    """Find what [batch, heads, length, head_size] was split from. Raises NotFused, calling it `what`."""
    value, scale = unscaled(value)
    return replace(_cached(value, what), scale=scale)


def key_heads_of(value: ir.Value | None) -> SplitHeads:
    """Likewise for keys [batch, heads, head_size, length]."""
    value, scale = unscaled(value)
    transposed = producer(value, "Transpose")
    if transposed is not None and _order(transposed) == TRANSPOSED:
        inner, more = unscaled(transposed.inputs[0])
        return replace(_cached(inner, "keys"), scale=scale * more)
    return replace(_split(value, KEYS, "keys"), scale=scale)


def unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
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


def _cached(value: ir.Value | None, what: str) -> SplitHeads:
    """Through repetition, cache and rotation."""
    once, repeats = _unrepeated(value)
    concat = producer(once, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in (2, -2):
        heads = _rotated(once, what)
        return replace(heads, repeats=repeats, views=(once, value) if once is not None and value is not None else ())
    past, new = concat.inputs
    present = concat.outputs[0]
    if past is None or not past.is_graph_input() or not present.is_graph_output():
        raise NotFused(f"{what} are appended to what is no cache of the graph")
    heads = _rotated(new, what)
    if past.shape is None or len(past.shape) != 4 or list(past.shape)[1::2] != [heads.count, heads.head_size]:
        raise NotFused(f"{what}: the cache {past.name} is not [batch, {heads.count}, length, {heads.head_size}]")
    assert value is not None
    return replace(heads, past=past, present=present, repeats=repeats, views=(present, value))


def _unrepeated(value: ir.Value | None) -> tuple[ir.Value | None, int]:
    """The heads before each was repeated, and how often."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if value is None or unsqueeze is None or expand is None:
        return value, 1
    once, axes, sizes = unsqueeze.inputs[0], constant(unsqueeze.inputs[1]), sizes_in(expand.inputs[1])
    if axes is None or axes.numpy().tolist() != [2] or len(sizes) != 5:
        return value, 1
    heads, size, repeats = size_of(once, -3), size_of(once, -1), sizes[2]
    if not isinstance(heads, int) or not isinstance(repeats, int) or sizes[1] not in (heads, 1):
        return value, 1
    if sizes[4] not in (size, 1) or (size_of(value, -3), size_of(value, -1)) != (heads * repeats, size):
        return value, 1
    return once, repeats


def _rotated(value: ir.Value | None, what: str) -> SplitHeads:
    node = producer(value, "RotaryEmbedding", MICROSOFT)
    if node is None:
        return _split(value, SPLIT, what)
    return replace(_split(_whole(node.inputs[0]), SPLIT, what), rotation=node)


def _whole(value: ir.Value | None) -> ir.Value | None:
    """Before a Slice that takes everything, as models that may rotate a part write it."""
    node = producer(value, "Slice")
    source = node.inputs[0] if node is not None else None
    if node is None or source is None or source.shape is None or slice_bounds(node, source) != (0, source.shape[-1]):
        return value
    return source


def _split(value: ir.Value | None, order: tuple[int, ...], what: str) -> SplitHeads:
    transpose = producer(value, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    norm = transpose.inputs[0].producer() if transpose is not None and transpose.inputs[0] is not None else None
    if norm is not None and norm.op_type in NORMS and producer(norm.inputs[0], "Reshape") is not None:
        raise NotFused(f"{norm.op_type} of each head (QK-norm) stands between {what} and attention")
    if transpose is None or reshape is None or _order(transpose) != order:
        raise NotFused(f"{what} are not split by Reshape and Transpose, but made by {_made_by(value, transpose)}")
    source, split = reshape.inputs[0], reshape.outputs[0].shape
    size = split[-1] if split is not None and len(split) == 4 else None
    width = source.shape[-1] if source is not None and source.shape is not None and len(source.shape) == 3 else None
    if source is None or not isinstance(size, int) or not isinstance(width, int) or width % size:
        raise NotFused(f"{what}: number of heads is not known")
    return SplitHeads(source, size, width // size)


def _order(transpose: ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes.get_ints("perm", ()))


def _made_by(value: ir.Value | None, transpose: ir.Node | None) -> str:
    node = value.producer() if value is not None else None
    if transpose is not None and transpose.inputs[0] is not None:
        node = transpose.inputs[0].producer() or node
    return node.op_type if node is not None else "nothing"


def is_order(node: ir.Node | None, order: tuple[int, ...]) -> bool:
    """Whether a node is the Transpose of these axes."""
    return node is not None and is_op(node, "Transpose") and _order(node) == order
