"""Products with a constant matrix, in whatever format the weights are by now.

    MatMul, Gemm, FusedMatMul                  float weights, also through a Transpose
    MatMulNBits                                2 to 8 bits in blocks
    DynamicQuantizeMatMul                      8 bits, activations quantized inside
    MatMulIntegerToFloat                       8 bits, activations quantized before
    MatMulInteger, Cast, Mul                   the same in several nodes
    MatMul(…, DequantizeLinear(codes))         QDQ, activations as they are or through QuantizeLinear, DequantizeLinear

`Product.activation` is the float activation in each case, so that whoever looks at inputs of products sees the same
value at every stage of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.linear import PARTS, match_linear
from onnxpress.graph.matching import is_op, only_reader, other_input, producer
from onnxpress.graph.tensors import concrete_shape


@dataclass(frozen=True)
class Product:
    """y = x · W (+ b)."""

    node: ir.Node
    activation: ir.Value
    """x [..., in features], in floating point."""
    weight: ir.Value
    """The initializer that holds W or its codes."""
    features: tuple[int, int]
    """(in, out)"""
    bias: ir.Value | None
    """b [out], added by the node itself or by an Add after it."""
    output: ir.Value
    """y, with its bias."""

    @property
    def name(self) -> str:
        """The weight's: `model.layers.0.mlp.up_proj.weight`, followed by a suffix such as `.q4b32` once quantized."""
        return str(self.weight.name)


def find_products(nodes: Iterable[ir.Node]) -> Iterator[Product]:
    """All products with a constant matrix among `nodes`, in their order."""
    for node in nodes:
        found = _match(node)
        if found is not None:
            yield found


def _match(node: ir.Node) -> Product | None:
    inputs = node.inputs
    if len(inputs) < 2 or inputs[0] is None:
        return None
    if (node.domain == "" and node.op_type in ("MatMul", "Gemm")) or is_op(node, "FusedMatMul", MICROSOFT):
        return _float_product(node)
    integer = node.domain == "" and node.op_type == "MatMulInteger"
    codes = inputs[1]
    if not (integer or node.domain == MICROSOFT) or codes is None or codes.const_value is None:
        return None
    if node.op_type == "MatMulNBits":
        features = (int(node.attributes["K"].value), int(node.attributes["N"].value))
        return _product(node, inputs[0], codes, features, _input(node, 5))
    if integer or node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
        shape = concrete_shape(codes.const_value)
        if len(shape) != 2:
            return None
        if node.op_type == "DynamicQuantizeMatMul":
            return _product(node, inputs[0], codes, (shape[0], shape[1]), _input(node, 4))
        activation = _before_codes(inputs[0])
        if activation is None:
            return None
        return _product(node, activation, codes, (shape[0], shape[1]), None if integer else _input(node, 6))
    return None


def _float_product(node: ir.Node) -> Product | None:
    """A product with float weights, or with codes that a DequantizeLinear or a Cast makes float."""
    linear = match_linear(node)
    if linear is not None:
        weight, transposed, bias = linear.weight, linear.transposed, linear.bias
    else:
        stored = producer(node.inputs[1], "DequantizeLinear") or producer(node.inputs[1], "Cast")
        if stored is None or stored.inputs[0] is None or _is_set(node, "transA"):
            return None
        weight, transposed = stored.inputs[0], _is_set(node, "transB")
        bias = _input(node, 2) if node.op_type == "Gemm" else None
    tensor = weight.const_value if weight.is_initializer() and not weight.is_graph_input() else None
    if tensor is None or len(tensor.shape) != 2 or str(weight.name).endswith(PARTS):
        return None
    rows, columns = concrete_shape(tensor)
    activation = node.inputs[0]
    assert activation is not None
    features = (columns, rows) if transposed else (rows, columns)
    return _product(node, _before_codes(activation) or activation, weight, features, bias)


def _before_codes(value: ir.Value) -> ir.Value | None:
    """The value that was quantized to make `value`: codes, or codes that were dequantized again."""
    node = value.producer()
    if is_op(node, "DequantizeLinear"):
        assert node is not None
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if is_op(node, "DynamicQuantizeLinear"):
        assert node is not None
        return node.inputs[0]
    if not is_op(node, "QuantizeLinear"):
        return None
    assert node is not None
    scaled = producer(node.inputs[0], "Div")  # by the largest magnitude of each token
    if scaled is not None and producer(scaled.inputs[1], "Max") is not None:
        return scaled.inputs[0]
    return node.inputs[0]


def _product(
    node: ir.Node, activation: ir.Value, weight: ir.Value, features: tuple[int, int], bias: ir.Value | None
) -> Product:
    output = node.outputs[0]
    if node.op_type == "MatMulInteger":
        for op_type in ("Cast", "Mul"):
            reader = only_reader(output)
            if reader is not None and reader.op_type == op_type:
                output = reader.outputs[0]
    output = _with_parts(output)
    scaled = only_reader(output)
    if node.op_type == "MatMulIntegerToFloat" and is_op(scaled, "Mul"):  # times the magnitude of each token
        assert scaled is not None
        if producer(other_input(scaled, output), "Max") is not None:
            output = scaled.outputs[0]
    add = only_reader(output)
    if bias is None and is_op(add, "Add"):
        assert add is not None
        other = other_input(add, output)
        tensor = other.const_value if other is not None and other.is_initializer() else None
        if tensor is not None and concrete_shape(tensor) == (features[1],):
            bias, output = other, add.outputs[0]
    output = _with_parts(output)
    return Product(node, activation, weight, features, bias, output)


def _with_parts(output: ir.Value) -> ir.Value:
    """The result of a product, plus its offsets or its outliers, which are a small product of their own."""
    add = only_reader(output)
    part = producer(other_input(add, output), "MatMul") if add is not None and is_op(add, "Add") else None
    weight = part.inputs[1] if part is not None else None
    if add is None or weight is None or not str(weight.name).endswith(PARTS):
        return output
    return add.outputs[0]


def _is_set(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].value)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None
