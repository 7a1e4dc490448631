"""QuantizeLinear and DequantizeLinear around what runtimes are to compute in integers.

A runtime that knows `DequantizeLinear -> operator -> QuantizeLinear` runs the operator on the codes: onnxruntime's CPU
provider turns a product between two DequantizeLinear into MatMulIntegerToFloat, and one with a QuantizeLinear behind it
into QLinearMatMul or QGemm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.graph.edits import add_constant, add_weight, drop_unused
from onnxpress.graph.linear import Linear
from onnxpress.optimizers.quantization.activation_ranges import ActivationGrid
from onnxpress.optimizers.quantization.channel_weights import IntegerBias, IntegerWeight, whole_names
from onnxpress.optimizers.quantization.maths.channels import WeightType, quantize_tensor


def through_codes(
    graph: ir.Graph, value: ir.Value, grid: ActivationGrid, readers: Iterable[ir.Node] | None = None
) -> ir.Value:
    """Let these readers of a value see what its codes stand for; without any, all that read it, the caller included.

    Two nodes are put before the first of these readers, or right behind what computes the value.
    """
    name = str(value.name)
    scale = add_weight(graph, f"{name}.{grid.type}.scale", ir.tensor(np.asarray(grid.scale)))
    zero_point = add_weight(graph, f"{name}.{grid.type}.zero_point", ir.tensor(grid.zero_point))
    stem = str(scale.name).replace(".scale", "")  # numbered, where another pass has quantized the value before
    quantize = ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{stem}/quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero_point], name=f"{stem}/dequantize")
    codes, decoded = quantize.outputs[0], dequantize.outputs[0]
    codes.name, codes.shape = stem, value.shape
    codes.type = ir.TensorType(ir.DataType.from_numpy(grid.zero_point.dtype))
    decoded.name, decoded.shape, decoded.type = f"{stem}.float", value.shape, ir.TensorType(ir.DataType.FLOAT)
    if readers is None:
        producer = value.producer()
        assert producer is not None
        if value.is_graph_output():  # the output keeps its name
            value.name, decoded.name = f"{name}.exact", name
        ir.convenience.replace_all_uses_with(value, decoded, replace_graph_outputs=True)
        quantize.replace_input_with(0, value)
        graph.insert_after(producer, [quantize, dequantize])
        return decoded
    wanted = set(readers)
    graph.insert_before(next(node for node in graph if node in wanted), [quantize, dequantize])
    for node, index in list(value.uses()):
        if node in wanted:
            node.replace_input_with(index, decoded)
    return decoded


def put_weight(linear: Linear, weight: IntegerWeight, bias: IntegerBias | None) -> None:
    """Let a product multiply by integer weights [in, out], and add an integer bias where there is one."""
    graph, node = linear.node.graph, linear.node
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(1, _dequantized(graph, node, weight, axis=1))
    if node.attributes.get_int("transB", 0):
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    if bias is not None:
        assert linear.bias is not None
        node.replace_input_with(2, _dequantized(graph, node, bias, axis=0))
        drop_unused(graph, linear.bias)
    drop_unused(graph, linear.weight)


def put_constant(graph: ir.Graph, node: ir.Node, position: int, weight_type: WeightType) -> None:
    """Let an operator read a constant as integers with one scale."""
    value = node.inputs[position]
    assert value is not None
    assert value.const_value is not None
    arrays = quantize_tensor(np.asarray(value.const_value.numpy(), np.float32), weight_type)
    names = whole_names(str(value.name), weight_type)
    values = [add_constant(graph, name, array) for name, array in zip(names, arrays, strict=True)]
    node.replace_input_with(position, _dequantized(graph, node, values, axis=0))
    drop_unused(graph, value)


def _dequantized(graph: ir.Graph, node: ir.Node, operands: Sequence[ir.Value], axis: int) -> ir.Value:
    """Compute what codes, scales and perhaps zero points stand for, right before the node that wants it."""
    codes, scales = operands[:2]
    attributes = {"axis": axis} if scales.shape is not None and len(scales.shape) else {}
    number = len(codes.uses())
    name = f"{codes.name}_{number}" if number else str(codes.name)
    dequantize = ir.node("DequantizeLinear", operands, attributes, name=f"{name}/dequantize")
    found = dequantize.outputs[0]
    found.name, found.shape, found.type = f"{name}.float", codes.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, dequantize)
    return found
