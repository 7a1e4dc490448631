"""Places where the channels of an activation can be rescaled for nothing: (x / s) · (s W) = x · W.

A site is an activation that only products read, s going into their weights, and 1 / s into constants that already scale
what computes x. Going back from x, factors pass through

    LayerNormalization and its kin     they end in gain and bias                               site "norm"
    a product with a constant matrix   they end in its columns                                 site "up"
    Add of a constant                  which takes them, too
    Mul                                by way of either operand: in silu(gate) · up, of `up`
    Relu, LeakyRelu, Identity          s > 0
    Split, Slice, packed projections   they end in the part's columns
    attention                          by way of its values: what weights values by head keeps their channels apart.
                                       Query heads that share a key/value head share its factors   site "value"

and through nothing else: Gelu bends differently at every scale. There a Mul of its own can take them: site "node".

The key/value cache of a site "value" holds v / s, so that the graph must read what it wrote itself: graphs that share
caches, as the decoders of an encoder-decoder do, have no such sites.

SmoothQuant, AWQ and equalization are choices of s: see `onnxpress.optimizers.quantization.maths.channel_scaling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Integers
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.linear import Linear, find_linears
from onnxpress.graph.matching import constant, is_op, scalar, weight
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import concrete_shape
from onnxpress.optimizers.quantization.folding.site import FREE, FoldingSite, Kind, Slot

NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1, None),
    ("", "SimplifiedLayerNormalization"): (1, None),
    (MICROSOFT, "SkipLayerNormalization"): (2, 3),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (2, None),
}
"""Where a norm takes its gain and its bias."""
TRANSPARENT = {("", "Relu"), ("", "LeakyRelu"), ("", "Identity")}
ATTENTIONS = {
    (MICROSOFT, "GroupQueryAttention"): ("num_heads", "kv_num_heads", 4),
    (MICROSOFT, "MultiHeadAttention"): ("num_heads", "num_heads", 7),
    ("", "Attention"): ("q_num_heads", "kv_num_heads", 5),
}
"""Attributes with the numbers of heads, and the input with the values of the past; output 2 is the present."""
BIAS = 3
"""Where MultiHeadAttention takes a bias of all three projections."""
PAST, OF_ENCODER = "past_key_values.", ".encoder."


def find_folding_sites(graph: ir.Graph, report: Report, kinds: Sequence[Kind] = FREE) -> list[FoldingSite]:
    """All sites of these kinds, in graph order; why other inputs of products are none goes to the report.

    Fold from the last to the first where factors depend on weights: a site changes the columns of weights whose rows an
    earlier one changes.
    """
    linears: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(graph):
        linears.setdefault(linear.activation, []).append(linear)
    tracer = Tracer(graph, {linear.node: linear for group in linears.values() for linear in group})
    sites = []
    for group in linears.values():
        try:
            site = tracer.site(group, "node" in kinds)
        except Blocked as blocked:
            report.skip(str(blocked))
            continue
        if site.kind in kinds:
            sites.append(site)
    return sites


class Blocked(Exception):
    """Why factors go no further."""


@dataclass(frozen=True)
class _Path:
    """How far factors have come from x."""

    value: ir.Value
    readers: frozenset[ir.Node]
    """All that may read the value."""
    width: int
    """Channels of the value."""
    start: int
    """The first of the channels that are meant."""
    groups: Integers
    """By feature of x, the channel after `start`."""
    kind: Kind = "up"
    slots: tuple[Slot, ...] = ()


class Tracer:
    """Follows factors from the inputs of products to the constants that take them."""

    def __init__(self, graph: ir.Graph, linears: Mapping[ir.Node, Linear]) -> None:
        self.linears = linears
        names = [str(value.name) for value in graph.inputs]
        self.keeps_cache = any(name.startswith(PAST) for name in names) and not any(OF_ENCODER in one for one in names)
        """Whether the values that a graph caches come back to itself alone."""

    def site(self, linears: Sequence[Linear], node: bool) -> FoldingSite:
        """The site of all products that read one activation. Raises Blocked with the reason where it is none.

        node: a Mul may take factors that nothing else takes.
        """
        nodes = frozenset(linear.node for linear in linears)
        for linear in linears:
            self._require_own(linear, nodes)
        features = linears[0].shape[0]
        channels = np.arange(features)
        try:
            path = self._follow(_Path(linears[0].activation, nodes, features, 0, channels))
        except Blocked:
            if not node:
                raise
            return FoldingSite("node", tuple(linears), (), channels)
        return FoldingSite(path.kind, tuple(linears), path.slots, path.groups)

    def _follow(self, path: _Path) -> _Path:
        value, node = path.value, path.value.producer()
        users = [user for user, _ in value.uses()]
        if value.is_graph_output() or len(users) > len(path.readers) or not path.readers.issuperset(users):
            raise Blocked("input is read by more than products")
        if node is None:
            raise Blocked("input comes from outside")
        key = (node.domain, node.op_type)
        if node in self.linears:
            return self._product(path, self.linears[node])
        if key in NORMS and value is node.outputs[0]:
            return self._norm(path, node)
        if key in ATTENTIONS and value is node.outputs[0]:
            return self._attention(path, node)
        if key in TRANSPARENT and node.inputs[0] is not None:
            return self._follow(replace(path, value=node.inputs[0], readers=frozenset([node])))
        if key == ("", "Split"):
            return self._split(path, node)
        if key == ("", "Slice"):
            return self._slice(path, node)
        if key in (("", "Add"), ("", "Mul")):
            return self._elementwise(path, node)
        raise Blocked(f"{node.op_type} keeps factors out")

    def _product(self, path: _Path, linear: Linear) -> _Path:
        self._require_own(linear, frozenset([linear.node]))
        if linear.shape[1] != path.width:
            raise Blocked(f"{linear.node.op_type} is broadcast")
        slots = [Slot(linear.node, linear.weight, 0 if linear.transposed else 1, path.start)]
        if linear.bias is not None:
            slots.append(self._vector(path, linear.node, linear.bias))
        return replace(path, slots=(*path.slots, *slots))

    def _norm(self, path: _Path, node: ir.Node) -> _Path:
        values = [node.inputs[i] for i in NORMS[node.domain, node.op_type] if i is not None and i < len(node.inputs)]
        slots = [self._vector(path, node, value) for value in values if value is not None]
        return self._gained(path, slots)

    @staticmethod
    def _gained(path: _Path, slots: Sequence[Slot]) -> _Path:
        return replace(path, kind="norm" if path.kind == "up" else path.kind, slots=(*path.slots, *slots))

    def _attention(self, path: _Path, node: ir.Node) -> _Path:
        query_heads, value_heads, past = ATTENTIONS[node.domain, node.op_type]
        if any(name not in node.attributes for name in (query_heads, value_heads)):
            raise Blocked("attention does not tell its heads")
        heads, kv_heads = (node.attributes[name].as_int() for name in (query_heads, value_heads))
        if is_op(node, "MultiHeadAttention", MICROSOFT) and _input(node, BIAS) is not None:
            raise Blocked("attention adds biases")
        present = node.outputs[2] if len(node.outputs) > 2 else None
        cached = _input(node, past) is not None or (present is not None and present.name)
        if cached and not (self.keeps_cache and _is_own_cache(_input(node, past), present)):
            raise Blocked("another graph reads the cached values")
        if path.width % heads:
            raise Blocked("heads do not divide the width")
        head_dim = path.width // heads
        channel = np.arange(path.width)
        groups = channel // head_dim // (heads // kv_heads) * head_dim + channel % head_dim
        value, width, start = _input(node, 2), kv_heads * head_dim, 0
        if value is None:  # packed: queries, keys, values
            if not is_op(node, "GroupQueryAttention", MICROSOFT):
                raise Blocked("projections are interleaved")
            value, start = node.inputs[0], (heads + kv_heads) * head_dim
            width += start
        assert value is not None
        if path.start or len(path.groups) != path.width:
            raise Blocked("attention is cut into parts")
        return self._follow(
            replace(
                path,
                value=value,
                readers=frozenset([node]),
                width=width,
                start=start,
                groups=groups[path.groups],
                kind="value",
            )
        )

    def _split(self, path: _Path, node: ir.Node) -> _Path:
        whole, sizes = node.inputs[0], constant(_input(node, 1))
        if whole is None or sizes is None or not _is_last(whole, node.attributes.get_int("axis", 0) or 0):
            raise Blocked("Split of unknown parts")
        widths = [int(size) for size in sizes.numpy()]
        start = path.start + sum(widths[: node.outputs.index(path.value)])
        return self._follow(
            replace(path, value=whole, readers=frozenset([node]), width=sum(widths), start=start),
        )

    def _slice(self, path: _Path, node: ir.Node) -> _Path:
        """One of several slices of the same value, none of which reads the channels of another."""
        whole = node.inputs[0]
        assert whole is not None
        users = list(whole.consumers())
        bounds = {user: _slice_bounds(user, whole) for user in users}
        start, stop = bounds.pop(node) or (0, 0)
        if start >= stop or any(one is None or (one[0] < stop and one[1] > start) for one in bounds.values()):
            raise Blocked("Slice of unknown parts")
        assert whole.shape is not None
        width = int(whole.shape[-1])  # type: ignore[arg-type]
        return self._follow(replace(path, value=whole, readers=frozenset(users), width=width, start=start + path.start))

    def _elementwise(self, path: _Path, node: ir.Node) -> _Path:
        """Add: a constant takes factors, and so does what it is added to. Mul: either operand does."""
        operands = [value for value in node.inputs if value is not None]
        constants = [value for value in operands if weight(value) is not None]
        others = [value for value in operands if weight(value) is None]
        onward = [replace(path, value=value, readers=frozenset([node])) for value in others]
        if node.op_type == "Add":
            if len(constants) != 1:
                raise Blocked("Add of two activations keeps factors out")
            slots = (*path.slots, self._vector(path, node, constants[0]))
            return self._follow(replace(onward[0], slots=slots))
        for value in constants:  # the gain of a decomposed norm
            if _is_vector(value, path.width):
                return self._gained(path, [self._vector(path, node, value)])
        reasons = []
        for other in onward:
            try:
                return self._follow(other)
            except Blocked as blocked:
                reasons.append(blocked)
        raise reasons[-1] if reasons else Blocked("Mul of constants")

    def _vector(self, path: _Path, node: ir.Node, value: ir.Value) -> Slot:
        offset, add = 0.0, value.producer()
        if add is not None and is_op(add, "Add") and len(value.uses()) == 1:  # 1 + w, as Gemma's norms have it
            numbers = [scalar(one) for one in add.inputs]
            if numbers.count(None) == 1:
                place = numbers.index(None)
                offset, node, value = numbers[1 - place] or 0.0, add, add.inputs[place] or value
        if not _is_vector(value, path.width) or value.dtype != ir.DataType.FLOAT:
            raise Blocked("gain or bias is not a float32 constant per channel")
        return Slot(node, value, 0, path.start, offset)

    def _require_own(self, linear: Linear, nodes: frozenset[ir.Node]) -> None:
        """That no product but `nodes` reads a weight."""
        if linear.weight.is_graph_output() or not nodes.issuperset(_readers(linear.weight)):
            raise Blocked("weight is shared")


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The readers of a weight, through transposes."""
    for node in value.consumers():
        if is_op(node, "Transpose"):
            yield from _readers(node.outputs[0])
        else:
            yield node


def _is_last(value: ir.Value, axis: int) -> bool:
    return axis == -1 or (value.shape is not None and axis + 1 == len(value.shape))


def _slice_bounds(node: ir.Node, value: ir.Value) -> tuple[int, int] | None:
    """The begin and end of a Slice along the last axis of `value`, if it is one of steps of 1."""
    if not is_op(node, "Slice") or value.shape is None or not isinstance(value.shape[-1], int):
        return None
    numbers = [scalar(one) for one in node.inputs[1:]]  # starts, ends, axes, steps
    if len(numbers) < 3 or None in numbers or not _is_last(value, int(numbers[2] or 0)) or numbers[3:] not in ([], [1]):
        return None
    start, stop, _ = slice(int(numbers[0] or 0), int(numbers[1] or 0)).indices(value.shape[-1])
    return start, stop


def _is_own_cache(past: ir.Value | None, present: ir.Value | None) -> bool:
    """Whether an attention reads values from an input of the graph and hands them on to an output of it alone."""
    return (
        past is not None
        and present is not None
        and past.is_graph_input()
        and len(past.uses()) == 1
        and present.is_graph_output()
        and not present.uses()
    )


def _input(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _is_vector(value: ir.Value, width: int) -> bool:
    tensor = weight(value)
    return tensor is not None and concrete_shape(tensor) == (width,)
