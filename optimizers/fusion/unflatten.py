"""Products of matrices that exporters flatten, as products of what they came from, and tables in the layout of ours.

    Reshape(Gemm(Reshape(x, [-1, in]), W, b), [batch, length, out])  =>  Add(MatMul(x, W), b)
    Gather(Transpose(W), ids), MatMul(x, W)                          =>  Gather(W', ids), MatMul(x, Transpose(W'))
    Slice(p, 0, n), Slice(p, n, 2n)                                  =>  Split(p, [n, n])
    Slice(x, 0, n), Concat(x, Slice(x, n, n))                        =>  x, if x has n features

The first is how torch writes GPT-2's layers, the second how the genai builder writes an embedding that is the head:
W' [vocabulary, hidden] then is one table under the name of the embedding, as in our exports. The third is a packed
product that torch's older exporter takes apart, the fourth what is left of rotating a part of each head if that is all.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxpress.graph.anatomy.layers import module_of
from onnxpress.graph.linear import match_linear
from onnxpress.graph.matching import is_op, only_reader, producer, slice_bounds, weight
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import concrete_shape


def unflatten_products(graph: ir.Graph, report: Report) -> None:
    """Replace what matches; leaves dead nodes behind. Wants shapes to be known."""
    for node in list(graph):
        if is_op(node, "Gemm") and _unflatten(graph, node):
            report.match("products of flat matrices")


def _unflatten(graph: ir.Graph, gemm: ir.Node) -> bool:
    linear = match_linear(gemm)
    before = producer(gemm.inputs[0], "Reshape")
    after = only_reader(gemm.outputs[0])
    if linear is None or linear.transposed or before is None or after is None or not is_op(after, "Reshape"):
        return False
    source, result = before.inputs[0], after.outputs[0]
    if source is None or source.shape is None or result.shape is None or len(source.shape) != 3:
        return False
    if list(source.shape) != [*list(result.shape)[:-1], linear.shape[0]] or result.shape[-1] != linear.shape[1]:
        return False
    if any(isinstance(size, ir.SymbolicDim) and size.value is None for size in source.shape):
        return False
    nodes = [ir.node("MatMul", [source, linear.weight], name=gemm.name)]
    if linear.bias is not None:
        nodes[0].outputs[0].type, nodes[0].outputs[0].shape = result.type, result.shape
        nodes.append(ir.node("Add", [nodes[0].outputs[0], linear.bias]))
    for node in nodes:
        node.metadata_props.update(gemm.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, after, [after], nodes, [result], [nodes[-1].outputs[0]])
    return True


def join_slices(graph: ir.Graph, report: Report) -> None:
    """Split in the place of Slices that together take what a product makes apart, as torch's `chunk` becomes."""
    pieces: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if is_op(node, "Slice") and node.inputs[0] is not None and _is_product(node.inputs[0]):
            pieces.setdefault(node.inputs[0], []).append(node)
    for value, nodes in pieces.items():
        bounds = [slice_bounds(node, value) for node in nodes]
        if len(nodes) < 2 or any(one is None for one in bounds):
            continue
        order = sorted(range(len(nodes)), key=lambda i: bounds[i] or (0, 0))
        nodes, ends = [nodes[i] for i in order], [bounds[i] or (0, 0) for i in order]
        assert value.shape is not None
        if [0, *(end for _, end in ends)] != [*(start for start, _ in ends), value.shape[-1]]:
            continue
        sizes = ir.tensor(np.array([end - start for start, end in ends], np.int64))
        constant = ir.node("Constant", [], {"value": sizes})
        split = ir.node("Split", [value, constant.outputs[0]], {"axis": -1}, num_outputs=len(nodes))
        split.metadata_props.update(nodes[0].metadata_props)
        for node, (start, end) in zip(nodes, ends, strict=True):  # a Slice may not have known all of its sizes
            node.outputs[0].shape = ir.Shape([*list(value.shape)[:-1], end - start])
        graph.insert_before(min(nodes, key=list(graph).index), [constant, split])
        for node, output in zip(nodes, split.outputs, strict=True):
            ir.convenience.replace_nodes_and_values(graph, node, [node], [], [node.outputs[0]], [output])
        report.match("slices as one split")


def drop_empty_slices(graph: ir.Graph, report: Report) -> None:
    """Read a value itself in the place of a Slice that takes all of its last axis, and join nothing to it."""
    for node in list(graph):
        if is_op(node, "Slice"):
            source = node.inputs[0]
            if source is not None and source.shape is not None and _bounds(node) == (0, source.shape[-1]):
                _replace(node, source, report)
        elif is_op(node, "Concat") and not node.outputs[0].is_graph_output():
            rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else 0
            full = [value for value in node.inputs if not _is_empty(value)]
            if rank and len(full) == 1 and node.attributes.get_int("axis", 0) in (-1, rank - 1) and full[0] is not None:
                _replace(node, full[0], report)


def _bounds(node: ir.Node) -> tuple[int, int] | None:
    source = node.inputs[0]
    return slice_bounds(node, source) if source is not None and source.shape is not None else None


def _is_empty(value: ir.Value | None) -> bool:
    """Whether it is a Slice of the last axis that takes nothing."""
    node = producer(value, "Slice")
    bounds = _bounds(node) if node is not None else None
    return bounds is not None and 0 <= bounds[1] <= bounds[0]


def _replace(node: ir.Node, value: ir.Value, report: Report) -> None:
    if not node.outputs[0].is_graph_output() and node.outputs[0].uses():
        node.outputs[0].replace_all_uses_with(value)
        report.match("empty slices")


def _is_product(value: ir.Value) -> bool:
    """Whether it is [batch, length, width], as a product makes it, width being known."""
    maker, shape = value.producer(), value.shape
    return maker is not None and maker.op_type in ("Add", "MatMul") and shape is not None and len(shape) == 3


def turn_tables(graph: ir.Graph, report: Report) -> None:
    """Store a table that is looked up through a Transpose as it is looked up; products read it through one instead."""
    for node in list(graph):
        transpose = producer(node.inputs[0], "Transpose") if is_op(node, "Gather") else None
        value = transpose.inputs[0] if transpose is not None else None
        tensor = weight(value)
        if transpose is None or value is None or tensor is None or len(tensor.shape) != 2:
            continue
        if tuple(transpose.attributes.get_ints("perm", (1, 0))) != (1, 0):
            continue
        others = [(user, index) for user, index in value.uses() if user is not transpose]
        if any(not is_op(user, "MatMul") or index != 1 for user, index in others):
            report.skip("table is read by more than lookups and products")
            continue
        module = module_of(node)
        _turn(graph, value, tensor, f"{module}.weight" if module else None)
        transpose.outputs[0].replace_all_uses_with(value)
        for user, index in others:
            back = ir.node("Transpose", [value], {"perm": [1, 0]})
            graph.insert_before(user, back)
            user.replace_input_with(index, back.outputs[0])
        graph.remove(transpose, safe=True)
        report.match("tables")


def _turn(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol, name: str | None) -> None:
    rows, columns = concrete_shape(tensor)
    value.shape = ir.Shape([columns, rows])
    if name is not None and name not in graph.initializers:
        value.name = name
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype),
        tensor.dtype,
        value.shape,
        name=value.name,
    )
