"""Packed projections taken apart into queries, keys and values for as long as heads are edited, then packed again.

    MatMul(x, W) [+ bias] -> Split, Slice, Reshape, Transpose, Gather
    =>  MatMul(x, query) [+ bias], MatMul(x, key) [+ bias], MatMul(x, value) [+ bias]
    =>  MatMul(x, W') [+ bias'] -> Split

W keeps its name and its layout, so that a checkpoint's place for it stays: either [queries | keys | values], as in
GPT-2, Phi-3 and ModernBERT, or the queries of each key/value head with its key and its value behind them, head by head,
as in GPT-NeoX, BLOOM and Falcon. Rotations of [batch, heads, length, head_dim] become rotations of what products make.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Floats, Indices
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Attention, Block, Product, anatomy_of
from onnxpress.graph.anatomy.editing import columns_of, select_part
from onnxpress.graph.anatomy.roles import FUSED
from onnxpress.graph.edits import add_constant, add_initializers, drop_unused
from onnxpress.graph.tensors import concatenate_tensors, concrete_shape
from onnxpress.optimizers.heads.column_moves import Columns, columns_at
from onnxpress.optimizers.heads.maths.request import Sizes

NAMES = ("query", "key", "value")


def packed_columns(sizes: Sizes, *, by_group: bool) -> list[Indices]:
    """Find the places of queries, keys and values in a packed product, each [heads · head_dim].

    Args:
        by_group: each key/value head stands behind its queries; else all queries come first, then all keys.
    """
    heads, kv_heads, head_dim = sizes
    every = np.arange((heads + 2 * kv_heads) * head_dim)
    if not by_group:
        return np.split(every, [heads * head_dim, (heads + kv_heads) * head_dim])
    groups = every.reshape(kv_heads, heads // kv_heads + 2, head_dim)
    return [groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)]


@contextmanager
def unpacked(model: ir.Model, chosen: Sequence[tuple[Block, Attention]]) -> Iterator[None]:
    """Every attention that is chosen reads a product of its own each for queries, keys and values; packed ones are
    packed again afterwards.

    Raises UnsupportedModelError, naming the layer, before anything is changed, where a layout is not known.
    """
    fused = [(block, attention) for block, attention in chosen if attention.node.op_type in FUSED]
    plans = [_plan(block, attention) for block, attention in fused if attention.packed]
    packed = [_unpack(plan) for plan in plans]
    for _, attention in fused:
        if not attention.packed:
            _flatten(attention)
    try:
        yield
    finally:
        if packed:
            found = {one.node: one for block in anatomy_of(model).blocks for one in block.attentions}
            for one in packed:
                _pack(found[one.node], one)


@dataclass(frozen=True)
class _Plan:
    attention: Attention
    operands: tuple[Columns, ...]
    """The columns of queries, keys, values; empty where the attention itself takes them packed."""
    by_group: bool
    sizes: Sizes


@dataclass(frozen=True)
class _Packed:
    """A packed product as it was."""

    node: ir.Node
    """The attention."""
    weight: str
    bias: str | None
    by_group: bool
    direct: bool
    """Whether the attention itself takes it packed."""
    metadata: dict[str, str]
    """Metadata of the product's node."""


def _plan(block: Block, attention: Attention) -> _Plan:
    product, node, where = attention.query, attention.node, block.title
    heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
    if heads is None or kv_heads is None or head_dim is None or heads % kv_heads:
        raise UnsupportedModelError(f"{where}: nothing tells how many heads are packed in {product.name}")
    sizes, width = (heads, kv_heads, head_dim), product.features[1]
    if node.inputs[0] is product.output and node.inputs[1] is None:
        return _Plan(attention, (), False, sizes)
    try:
        operands = tuple(columns_at(value, product.output, width) for value in node.inputs[:3])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{where}: query, key and value are packed in {product.name}: {error}") from error
    for by_group in (False, True):
        known = packed_columns(sizes, by_group=by_group)
        if all(np.array_equal(one.columns, columns) for one, columns in zip(operands, known, strict=True)):
            return _Plan(attention, operands, by_group, sizes)
    raise UnsupportedModelError(
        f"{where}: query, key and value are packed in {product.name} in an order that is neither one after the other "
        f"nor by groups of heads"
    )


def _unpack(plan: _Plan) -> _Packed:
    product, node = plan.attention.query, plan.attention.node
    graph, last = product.node.graph, product.output.producer()
    assert isinstance(graph, ir.Graph)
    assert last is not None
    stem, dead = product.name.removesuffix(".weight"), [last, product.node]
    for index, columns in enumerate(packed_columns(plan.sizes, by_group=plan.by_group)):
        output, added = _part(graph, product, columns, f"{stem}.{NAMES[index]}")
        graph.insert_after(last, added)
        last = added[-1]
        if plan.operands:
            _connect(node, index, plan.operands[index], output, plan.sizes[min(index, 1)])
            dead = [*reversed(plan.operands[index].nodes), *dead]
        else:
            node.replace_input_with(index, output)
    _remove(graph, dead)
    bias = None if product.bias is None else str(product.bias.name)
    return _Packed(node, product.name, bias, plan.by_group, not plan.operands, dict(product.node.metadata_props))


def _flatten(attention: Attention) -> None:
    """Rotations of heads apart, as rotations of what products make; whatever is no such rotation stays as it is."""
    sizes = (attention.heads, attention.kv_heads)
    for index, product in enumerate((attention.query, attention.key)):
        value, count = attention.node.inputs[index], sizes[index]
        if product is None or count is None or product.node.graph is None:
            continue
        try:
            columns = columns_at(value, product.output, product.features[1])
        except UnsupportedModelError:
            continue
        if columns.rotation is not None and not columns.flat and (np.diff(columns.columns) == 1).all():
            _connect(attention.node, index, columns, product.output, count)
            _remove(product.node.graph, list(reversed(columns.nodes)))


def _connect(node: ir.Node, index: int, way: Columns, output: ir.Value, heads: int) -> None:
    """An operand of an attention read from `output`, through the rotation that was on its way."""
    if way.rotation is None:
        node.replace_input_with(index, output)
        return
    if way.flat:
        way.rotation.replace_input_with(0, output)
        node.replace_input_with(index, way.rotation.outputs[0])
        return
    attributes = [one for name, one in way.rotation.attributes.items() if name != "num_heads"]
    attributes.append(ir.AttrInt64("num_heads", heads))
    inputs = [output, *way.rotation.inputs[1:]]
    rotation = ir.Node(way.rotation.domain, way.rotation.op_type, inputs, attributes)
    _name([rotation], way.rotation.metadata_props, output, f"{output.name}.rotated", None)
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, rotation)
    node.replace_input_with(index, rotation.outputs[0])


def _part(graph: ir.Graph, product: Product, columns: Indices, stem: str) -> tuple[ir.Value, list[ir.Node]]:
    """Some columns of a product as a product of its own, not in the graph yet."""
    weight, bias = columns_of(product, columns)
    return _product(graph, product.activation, (f"{stem}.weight", weight), (f"{stem}.bias", bias), product)


def _pack(attention: Attention, packed: _Packed) -> None:
    heads, kv_heads, head_dim = attention.heads, attention.kv_heads, attention.head_dim
    parts = [product for product in (attention.query, attention.key, attention.value) if product is not None]
    assert len(parts) == len(NAMES)
    assert heads is not None
    assert kv_heads is not None
    assert head_dim is not None
    graph, stem, sizes = attention.node.graph, packed.weight.removesuffix(".weight"), (heads, kv_heads, head_dim)
    assert isinstance(graph, ir.Graph)
    weight, bias = _joined(parts, np.argsort(np.concatenate(packed_columns(sizes, by_group=packed.by_group))))
    names = (packed.weight, packed.bias or f"{stem}.bias")
    product, nodes = _product(graph, parts[0].activation, (names[0], weight), (names[1], bias), parts[0])
    graph.insert_before(parts[0].node, nodes)
    if packed.direct:
        for index, value in enumerate((product, None, None)):
            attention.node.replace_input_with(index, value)
    else:
        more, values = _split(graph, product, sizes, stem, by_group=packed.by_group)
        graph.insert_after(nodes[-1], more)
        nodes += more
        for part, value in zip(parts, values, strict=True):
            ir.convenience.replace_all_uses_with(part.output, value)
    for node in nodes:
        node.metadata_props.update(packed.metadata)
    for part in parts:
        last = part.output.producer()
        _remove(graph, [one for one in (last, part.node) if one is not None])


def _split(
    graph: ir.Graph, product: ir.Value, sizes: Sizes, stem: str, *, by_group: bool
) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that take a packed product apart, and queries, keys and values."""
    heads, kv_heads, head_dim = sizes
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    nodes: list[ir.Node] = []

    def moved(op_type: str, value: ir.Value, name: str, numbers: list[int], outputs: int = 1) -> Sequence[ir.Value]:
        attributes = {"axis": 3 if by_group else 2} if op_type == "Split" else {}
        operand = add_constant(graph, f"{stem}.{name}", np.array(numbers, np.int64))
        nodes.append(ir.node(op_type, [value, operand], attributes, num_outputs=outputs))
        nodes[-1].name = f"{stem}.{op_type}.{name}"
        for number, output in enumerate(nodes[-1].outputs):
            output.name, output.type = f"{stem}.{op_type}.{name}.{number}", product.type
        return nodes[-1].outputs

    if by_group:
        group = heads // kv_heads
        (product_by_group,) = moved("Reshape", product, "groups", [0, 0, kv_heads, group + 2, head_dim])
        parts = moved("Split", product_by_group, "members", [group, 1, 1], 3)
        values = [
            moved("Reshape", part, f"width{width}", [0, 0, width])[0] for part, width in zip(parts, widths, strict=True)
        ]
        for value, node, name in zip(values, nodes[-3:], NAMES, strict=True):
            node.name = value.name = f"{stem}.Reshape.{name}"
    else:
        values = list(moved("Split", product, "widths", widths, 3))
    for value, width in zip(values, widths, strict=True):
        value.shape = None if product.shape is None else ir.Shape([*product.shape.dims[:-1], width])
    return nodes, values


def _joined(parts: Sequence[Product], order: Indices) -> tuple[ir.TensorProtocol, Floats | None]:
    """Weight [in, out] and bias [out] of products side by side, their columns put in an order."""
    pieces = [columns_of(part, None) for part in parts]
    weight: ir.TensorProtocol = concatenate_tensors([one for one, _ in pieces], axis=1)
    in_order = np.array_equal(order, np.arange(len(order)))
    weight = weight if in_order else select_part(weight, None, order)
    if all(bias is None for _, bias in pieces):
        return weight, None
    both = list(zip(parts, pieces, strict=True))
    biases = [np.zeros(part.features[1], np.float32) if bias is None else bias for part, (_, bias) in both]
    return weight, np.concatenate(biases)[order]


def _product(
    graph: ir.Graph,
    activation: ir.Value,
    weight: tuple[str, ir.TensorProtocol],
    bias: tuple[str, Floats | None],
    like: Product,
) -> tuple[ir.Value, list[ir.Node]]:
    """The output and the nodes, not in the graph yet, of a product with these weights."""
    (kernel,) = add_initializers(graph, [weight[0]], [weight[1]])
    nodes = [ir.node("MatMul", [activation, kernel])]
    if bias[1] is not None:
        nodes.append(ir.node("Add", [nodes[0].outputs[0], add_constant(graph, bias[0], bias[1])]))
    stem, width = weight[0].removesuffix(".weight"), int(concrete_shape(weight[1])[1])
    return _name(nodes, like.node.metadata_props, like.output, stem, width), nodes


def _name(
    nodes: Sequence[ir.Node], metadata: Mapping[str, str], like: ir.Value, stem: str, width: int | None
) -> ir.Value:
    """The last output of nodes, which get names, types and shapes [..., width], width None being that of `like`."""
    for node in nodes:
        node.name = f"{stem}.{node.op_type}"
        node.metadata_props.update(metadata)
        output = node.outputs[0]
        output.name, output.type = f"{node.name}.output", like.type
        if like.shape is not None:
            output.shape = ir.Shape([*like.shape.dims[:-1], like.shape[-1] if width is None else width])
    return nodes[-1].outputs[0]


def _remove(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Remove those that nothing reads, and what only they read; readers come before what they read."""
    for node in reversed(dict.fromkeys(reversed(nodes))):
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        constants = [value for value in node.inputs if value is not None and value.is_initializer()]
        graph.remove(node, safe=True)
        for value in constants:
            drop_unused(graph, value)
