"""The residual stream of a pre-norm transformer: all that writes into it and all that reads it, or why that is unclear.

Nothing is assumed: every value of the stream is followed to its makers and its readers, and whatever is no sum, norm,
product, or embedding raises UnsupportedModelError.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Doubles
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Product, anatomy_of, find_products
from onnxpress.graph.anatomy.layers import NORMS
from onnxpress.graph.tensors import RowTensor, concrete_shape, rows_of

ROWS = 4096
"""Rows of an embedding table that are read at once."""


@dataclass
class Stream:
    """Everything that a rotation of the residual stream touches; each is found once."""

    width: int
    values: dict[ir.Value, None] = field(default_factory=dict)
    tables: dict[ir.Value, None] = field(default_factory=dict)
    """Embeddings [rows, width]."""
    writers: dict[ir.Value, Product] = field(default_factory=dict)
    """Products whose outputs are added to the stream, by their weight."""
    norms: dict[ir.Node, list[Product]] = field(default_factory=dict)
    """Norms of the stream and the products that read each."""


def find_stream(model: ir.Model) -> Stream:
    """The residual stream. Raises UnsupportedModelError, naming the place, where it cannot be rotated."""
    anatomy = anatomy_of(model)
    norms = [node for block in anatomy.blocks for node in block.norms] + list(anatomy.final_norms)
    if not norms or norms[0].inputs[1] is None or norms[0].inputs[0] is None:
        raise UnsupportedModelError("no norms were found between which a residual stream runs")
    products = list(find_products(model.graph))
    outputs = {product.output: product for product in products}
    readers: dict[ir.Value, list[Product]] = {}
    for product in products:
        readers.setdefault(product.activation, []).append(product)
    gain = norms[0].inputs[_gain_index(norms[0])]
    if gain is None or gain.const_value is None:
        raise UnsupportedModelError(f"{norms[0].name}: the gain of the norm is no constant")
    stream = Stream(concrete_shape(gain.const_value)[0])
    pending: list[ir.Value] = [norms[0].inputs[0]]
    while pending:
        value = pending.pop()
        if value in stream.values:
            continue
        stream.values[value] = None
        if value.is_graph_output():
            raise UnsupportedModelError(f"{value.name}, an output of the model, is the residual stream itself")
        pending += _makers(stream, value, outputs)
        pending += _users(stream, value, readers)
    left = [node for node in norms if node not in stream.norms and _has_width(node, stream.width)]
    if left:
        raise UnsupportedModelError(f"{left[0].name} normalises something else than the residual stream")
    return stream


def _gain_index(node: ir.Node) -> int:
    return 2 if node.op_type.startswith("Skip") else 1


def _has_width(node: ir.Node, width: int) -> bool:
    gain = node.inputs[_gain_index(node)]
    return gain is not None and gain.const_value is not None and concrete_shape(gain.const_value) == (width,)


def _makers(stream: Stream, value: ir.Value, outputs: dict[ir.Value, Product]) -> list[ir.Value]:
    """The values that a value of the stream is made of, as far as they are the stream, too."""
    if value in outputs:
        stream.writers[outputs[value].weight] = outputs[value]
        return []
    node = value.producer()
    if node is None:
        raise UnsupportedModelError(f"{value.name}, an input of the model, is the residual stream itself")
    first = node.inputs[0] if node.inputs else None
    if node.op_type == "Gather" and _is_table(first, stream.width):
        assert first is not None
        stream.tables[first] = None
        return []
    if node.op_type == "Add" and not any(one is None or one.is_initializer() for one in node.inputs):
        return [one for one in node.inputs if one is not None]
    if node.op_type == "Mul":
        return _scaled(node)
    if node.op_type in NORMS:
        if node.op_type.startswith("Skip") and value in node.outputs[3:]:
            return [one for one in node.inputs[:2] if one is not None]
        raise UnsupportedModelError(
            f"{node.name}: the output of the norm is the residual stream (post-norm, as in BERT): its gain cannot be "
            "folded into the products after it",
            hint="reduce heads or the feed-forward width instead",
        )
    raise UnsupportedModelError(
        f"{node.op_type} {node.name} makes a part of the residual stream: no rotation passes it"
    )


def _users(stream: Stream, value: ir.Value, readers: dict[ir.Value, list[Product]]) -> list[ir.Value]:
    """The values that are the stream, too, because of those that read a value of it."""
    values: list[ir.Value] = []
    for node, index in value.uses():
        if node.op_type in NORMS and (index == 0 or (index == 1 and node.op_type.startswith("Skip"))):
            if node.op_type.startswith("Skip"):
                values += [one for one in node.inputs[:2] if one is not None]
                values += [one for one in node.outputs[3:] if one.uses()]
            stream.norms.setdefault(node, _readers(node, readers))
        elif node.op_type == "Add":
            values.append(node.outputs[0])
        elif node.op_type == "Mul":
            _scaled(node)
            values.append(node.outputs[0])
        elif node.op_type != "Shape":
            raise UnsupportedModelError(f"{node.op_type} {node.name} reads the residual stream without a norm")
    return values


def _readers(node: ir.Node, readers: dict[ir.Value, list[Product]]) -> list[Product]:
    """The products that read a norm, if nothing else does."""
    output = node.outputs[0]
    products = readers.get(output, [])
    others = {user for user, _ in output.uses() if user.op_type != "Shape"} - {product.node for product in products}
    if others or output.is_graph_output() or not products:
        who = next(iter(others)).op_type if others else "the model's output"
        raise UnsupportedModelError(
            f"{node.name} is read by {who}: the gain of the norm can only be folded into products",
            hint="post-norm models, such as BERT, and hidden states as outputs do not allow for it",
        )
    return products


def _scaled(node: ir.Node) -> list[ir.Value]:
    """The values that a Mul with a single number multiplies."""
    constants = [one for one in node.inputs if one is not None and one.is_initializer()]
    if len(constants) != 1 or constants[0].const_value is None or constants[0].const_value.size != 1:
        raise UnsupportedModelError(f"Mul {node.name} scales channels of the residual stream")
    return [one for one in node.inputs if one is not None and one is not constants[0]]


def _is_table(value: ir.Value | None, width: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    tensor = value.const_value
    return tensor.dtype == ir.DataType.FLOAT and concrete_shape(tensor)[1:] == (width,)


def rotate_rows(table: ir.Value, matrix: Doubles) -> None:
    """table · matrix, computed when it is written."""
    tensor = table.const_value
    assert tensor is not None
    read, rows = rows_of(tensor), concrete_shape(tensor)[0]
    table.const_value = RowTensor(
        lambda start, stop: (np.asarray(read(start, stop), np.float32) @ matrix).astype(np.float32),
        ir.DataType.FLOAT,
        (rows, matrix.shape[1]),
        name=table.name,
    )
    table.shape = ir.Shape([rows, matrix.shape[1]])


def moments_of(table: ir.Value) -> Doubles:
    """TᵀT [width, width]."""
    tensor = table.const_value
    assert tensor is not None
    read, (rows, width) = rows_of(tensor), concrete_shape(tensor)
    total = np.zeros((width, width))
    for start in range(0, rows, ROWS):
        part = np.asarray(read(start, min(start + ROWS, rows)), np.float64)
        total += part.T @ part
    return total
