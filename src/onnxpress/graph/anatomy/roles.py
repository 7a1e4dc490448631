"""The roles of the products of a layer, found by following the data, not by their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.graph.anatomy.products import Product
from onnxpress.graph.sizes import sizes_in

FUSED = {
    "GroupQueryAttention": "num_heads",
    "MultiHeadAttention": "num_heads",
    "DecoderMaskedMultiHeadAttention": "num_heads",
    "Attention": "q_num_heads",
}
"""Operators whose inputs 0, 1, 2 are query, key and value, and the attribute with the number of query heads."""
NOT_FUSED = "onnxpress.not_fused"
"""Where a Softmax says why fuse-foreign left its attention decomposed."""
ROTARY_INPUTS = (7, 8)
"""GroupQueryAttention's tables of cosines and sines."""
ACTIVATIONS = frozenset(
    {
        "Relu",
        "Gelu",
        "FastGelu",
        "BiasGelu",
        "QuickGelu",
        "Silu",
        "Sigmoid",
        "Tanh",
        "Erf",
        "HardSwish",
        "Swish",
        "Clip",
    }
)
SPLITS = frozenset({"Split", "Slice"})
BOOKKEEPING = frozenset({"Shape", "Size", "ConstantOfShape", "Range"})
"""These hand on shapes, not data."""


@dataclass(frozen=True)
class Attention:
    """One attention of a layer."""

    node: ir.Node
    """The fused operator, or the Softmax of attention that is decomposed."""
    query: Product
    key: Product | None
    value: Product | None
    """The same product as `query` where projections are packed, in the order query, key, value; None where they come
    from the cache, as in cross-attention after the first step."""
    output: Product | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    """None where attention is decomposed and no shape tells."""
    rotary: tuple[ir.Value, ir.Value] | None
    """Tables of cosines and sines [positions, rotated / 2], where queries and keys are rotated by a fused operator."""

    @property
    def packed(self) -> bool:
        return self.query is self.value

    @property
    def products(self) -> tuple[Product, ...]:
        """Each once: query, key, value, output."""
        every = (self.query, self.key, self.value, self.output)
        return tuple(dict.fromkeys(product for product in every if product is not None))


@dataclass(frozen=True)
class FeedForward:
    """down(activation(gate) · up), or down(activation(up)) without a gate."""

    gate: Product | None
    up: Product
    """The same as `gate` where both are packed."""
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        return tuple(dict.fromkeys(product for product in (self.gate, self.up, self.down) if product is not None))


def find_attentions(nodes: Sequence[ir.Node], products: Sequence[Product]) -> tuple[Attention, ...]:
    """The attentions among the nodes of one layer, in graph order; one whose query is no product is left out."""
    flow = _Flow(nodes, products)
    found = []
    for node in nodes:
        ends = _operands(node, flow)
        if ends is None:
            continue
        query, key, value, output = ends
        if value is None and key is None:  # packed: one input holds all three
            key = value = query
        sources = [flow.before(end) if end is not None else [] for end in (query, key, value)]
        # The projection is the nearest product; a low-rank one (q_a, q_b) is reached through it.
        q, k, v = (source[0] if source else None for source in sources)
        if q is None:
            continue
        after = flow.after(output)
        o = after[0] if after else None
        found.append(Attention(node, q, k, v, o, *_heads(node, q, k, o, query), _rotary(node, nodes)))
    return tuple(found)


def find_feed_forward(nodes: Sequence[ir.Node], products: Sequence[Product]) -> FeedForward | None:
    """The feed-forward network of the products of one layer that attention does not use, if it is all of them."""
    flow = _Flow(nodes, products)
    for down in products:
        sources = flow.before(down.activation)
        if set(products) != {down, *sources} or any(flow.before(source.activation) for source in sources):
            continue
        if len(sources) == 1:
            (up,) = sources
            return FeedForward(up if flow.is_split(up) else None, up, down)
        activated = [source for source in sources if flow.is_activated(source)]
        if len(sources) == 2 and len(activated) == 1:
            return FeedForward(activated[0], next(one for one in sources if one is not activated[0]), down)
    return None


class _Flow:
    """Follows values between the products of a layer."""

    def __init__(self, nodes: Iterable[ir.Node], products: Sequence[Product]) -> None:
        self.nodes = set(nodes)
        self.by_output = {product.output: product for product in products}
        self.by_output |= {product.node.outputs[0]: product for product in products}
        self.by_activation: dict[ir.Value, list[Product]] = {}
        for product in products:
            self.by_activation.setdefault(product.activation, []).append(product)

    def before(self, value: ir.Value | None) -> list[Product]:
        """The products that `value` is computed from with no other product in between, nearest first."""
        found: dict[int, Product] = {}
        queue, seen = [value], set()
        while queue:
            current = queue.pop(0)
            if current is None or current in seen:
                continue
            seen.add(current)
            if current in self.by_output:
                product = self.by_output[current]
                found.setdefault(id(product), product)
                continue
            node = current.producer()
            if node is not None and node in self.nodes and node.op_type not in BOOKKEEPING:
                queue.extend(node.inputs)
        return list(found.values())

    def after(self, value: ir.Value) -> list[Product]:
        """The products that read `value` with no other product in between, nearest first."""
        found: dict[int, Product] = {}
        queue, seen = [value], set()
        while queue:
            current = queue.pop(0)
            if current in seen:
                continue
            seen.add(current)
            if current in self.by_activation:
                found |= {id(product): product for product in self.by_activation[current]}
                continue
            for user, _ in current.uses():
                if user in self.nodes and user.op_type not in BOOKKEEPING:
                    queue.extend(user.outputs)
        return list(found.values())

    def is_activated(self, source: Product) -> bool:
        """Whether a nonlinear function is applied to what `source` makes, before anything else joins it."""
        return self._meets(source, ACTIVATIONS)

    def is_split(self, source: Product) -> bool:
        """Whether what `source` makes is cut into parts."""
        return self._meets(source, SPLITS)

    def _meets(self, source: Product, operators: frozenset[str]) -> bool:
        queue, seen = [source.output], set()
        while queue:
            current = queue.pop(0)
            if current in seen or current in self.by_activation:
                continue
            seen.add(current)
            users = [user for user, _ in current.uses() if user in self.nodes]
            if any(user.op_type in operators for user in users):
                return True
            queue += [output for user in users if not _joins(user, current) for output in user.outputs]
        return False


def _joins(node: ir.Node, value: ir.Value) -> bool:
    """Whether a node brings another branch in: the product of gate and up, a residual."""
    others = [other for other in node.inputs if other is not None and other is not value]
    return node.op_type in ("Mul", "Add") and any(not other.is_initializer() for other in others)


def _operands(node: ir.Node, flow: _Flow) -> tuple[ir.Value, ir.Value | None, ir.Value | None, ir.Value] | None:
    """Query, key, value and output of an attention, if the node is one."""
    if node.op_type in FUSED:
        query, key, value = (node.inputs[i] if len(node.inputs) > i else None for i in range(3))
        if node.op_type == "Attention" and node.domain != "":
            return None  # com.microsoft's holds its projections inside
        return (query, key, value, node.outputs[0]) if query is not None else None
    if node.op_type != "Softmax":
        return None
    scores = _matmul_of_two(node.inputs[0], flow)
    context = _reader_matmul(node.outputs[0], flow)
    if scores is None or context is None:
        return None
    return scores.inputs[-2], scores.inputs[-1], context.inputs[1], context.outputs[0]  # type: ignore[return-value]


def _matmul_of_two(value: ir.Value | None, flow: _Flow) -> ir.Node | None:
    """The nearest product of two activations that `value` is computed from."""
    queue, seen = [value], set()
    while queue:
        current = queue.pop(0)
        node = current.producer() if current is not None else None
        if node is None or node not in flow.nodes or node in seen:
            continue
        seen.add(node)
        if _multiplies_activations(node):
            return node
        if node.outputs[0] not in flow.by_output:
            queue.extend(node.inputs)
    return None


def _reader_matmul(value: ir.Value, flow: _Flow) -> ir.Node | None:
    queue, seen = [value], set()
    while queue:
        current = queue.pop(0)
        for node, _ in current.uses():
            if node not in flow.nodes or node in seen:
                continue
            seen.add(node)
            if _multiplies_activations(node):
                return node
            queue.extend(node.outputs)
    return None


def _multiplies_activations(node: ir.Node) -> bool:
    operands = node.inputs[-2:]
    return node.op_type in ("MatMul", "FusedMatMul", "Gemm") and not any(
        value is None or value.is_initializer() for value in operands
    )


def _heads(
    node: ir.Node, query: Product, key: Product | None, output: Product | None, states: ir.Value
) -> tuple[int | None, int | None, int | None]:
    """(heads, kv heads, head_dim)"""
    width = query.features[1] if query is not key else output.features[0] if output is not None else None
    if node.op_type in FUSED:
        attribute = node.attributes.get(FUSED[node.op_type])
        heads = int(attribute.value) if attribute is not None else None
    else:
        size = _head_size(states, query)
        heads = width // size if width is not None and size and size > 0 and width % size == 0 else None
    if heads is None or width is None:
        return heads, None, None
    head_dim = width // heads
    if key is None:
        return heads, None, head_dim
    keys = key.features[1] if query is not key else (query.features[1] - width) // 2
    return heads, keys // head_dim, head_dim


def _head_size(states: ir.Value, query: Product) -> int | None:
    """head_dim of queries [batch, heads, length, head_dim] that are decomposed: as their shape tells, or the first
    Reshape of what the projection makes."""
    if states.shape is not None and len(states.shape) == 4 and isinstance(states.shape[-1], int):
        return states.shape[-1]
    queue, seen = [query.output], set()
    while queue:
        value = queue.pop(0)
        if value in seen:
            continue
        seen.add(value)
        for node, index in value.uses():
            sizes = sizes_in(node.inputs[1]) if node.op_type == "Reshape" and index == 0 else []
            if len(sizes) >= 4:
                return sizes[-1] if isinstance(sizes[-1], int) else None
            if node.op_type not in BOOKKEEPING:
                queue += node.outputs
    return None


def _rotary(node: ir.Node, nodes: Sequence[ir.Node]) -> tuple[ir.Value, ir.Value] | None:
    if node.op_type == "GroupQueryAttention" and len(node.inputs) > ROTARY_INPUTS[1]:
        cos, sin = (node.inputs[i] for i in ROTARY_INPUTS)
        if cos is not None and sin is not None:
            return cos, sin
    rotation = next((one for one in nodes if one.op_type == "RotaryEmbedding"), None)
    if rotation is None:
        return None
    cos, sin = rotation.inputs[2:4] if rotation.domain else rotation.inputs[1:3]
    return (cos, sin) if cos is not None and sin is not None else None
