"""Weights that a file holds in half the bytes: float16 or bfloat16 on disk, float32 in the graph.

    in memory       MatMul(x, W)                           W float32 [in, out], a StoredTensor
    in the file     MatMul(x, Transpose(Cast(W)))          W bfloat16 [out, in]: the checkpoint's own bytes

`decode_weights` runs whenever a graph is loaded and `encode_weights` whenever one is saved, so that no pass ever sees
the Casts: to them it is the float32 graph, and what they leave alone keeps its bytes. Cast and Transpose are standard
ONNX; runtimes compute them once, when they load the graph. onnxruntime's CPU provider multiplies no bfloat16.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxpress.arrays import Floats
from onnxpress.graph.floats import widen
from onnxpress.graph.tensors import FileTensor, WeightTensor, concrete_shape, reads_rows, rows_of

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class WideTensor(WeightTensor):
    """float32(source), transposed where `transposed`; read a slab at a time where the source allows it."""

    def __init__(self, source: ir.TensorProtocol, *, transposed: bool = False, name: str | None = None) -> None:
        """`transposed`: source is a matrix [out, in], this is [in, out]."""
        shape = concrete_shape(source)
        super().__init__(
            self._values, ir.DataType.FLOAT, shape[::-1] if transposed else shape, name=name or source.name
        )
        self.source = source
        self.transposed = transposed

    @property
    def reads_rows(self) -> bool:
        return (
            isinstance(self.source, FileTensor) and len(self.shape) > 0 if self.transposed else reads_rows(self.source)
        )

    def rows(self, start: int, stop: int) -> Floats:
        if not self.transposed:
            return widen(rows_of(self.source)(start, stop))
        if isinstance(self.source, FileTensor):
            return widen(self.source.columns(start, stop).T)
        return widen(self.source.numpy()[:, start:stop].T)

    def _values(self) -> Floats:
        if self.reads_rows:
            return self.rows(0, concrete_shape(self)[0])
        return widen(self.source.numpy().T if self.transposed else self.source.numpy())


class StoredTensor(WideTensor):
    """A weight whose file is to hold `source`, in the format in which it is."""


def stored(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor that a file holds for `tensor`."""
    return tensor.source if isinstance(tensor, StoredTensor) else tensor


def decode_weights(model: ir.Model) -> None:
    """Cast(W), and the Transpose of it, become W itself where nothing reads the narrow weight as it is.

    Nothing is read. Left alone: a weight that is an input or output of the graph, or that other nodes read, too.
    """
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if tensor is None or tensor.dtype not in HALVES or value.is_graph_input() or value.is_graph_output():
                continue
            casts = [use.node for use in value.uses()]
            if not casts or not all(_is_inner(node, graph, "Cast") and _to_float32(node) for node in casts):
                continue
            transposes = [use.node for cast in casts for use in cast.outputs[0].uses()]
            transposed = bool(transposes) and all(
                _is_inner(node, graph, "Transpose") and _swaps(node, tensor) for node in transposes
            )
            tensor = StoredTensor(tensor, transposed=transposed, name=value.name)
            value.const_value, value.shape, value.type = tensor, tensor.shape, ir.TensorType(tensor.dtype)
            for node in transposes if transposed else casts:
                node.outputs[0].replace_all_uses_with(value)
            for node in [*(transposes if transposed else ()), *casts]:
                graph.remove(node, safe=True)


def encode_weights(model: ir.Model) -> None:
    """Undo `decode_weights`: weights in the format of their file, widened and transposed by nodes of the graph."""
    for graph in model.graphs():
        nodes: list[ir.Node] = []
        values = list(graph.initializers.values())
        graph.initializers.clear()  # they are registered again in this order
        for value in values:
            tensor = value.const_value
            if not isinstance(tensor, StoredTensor) or value.is_graph_input() or value.is_graph_output():
                graph.initializers.add(value)
                continue
            source = tensor.source
            shape = ir.Shape(concrete_shape(source))
            held = ir.Value(name=value.name, shape=shape, type=ir.TensorType(source.dtype), const_value=source)
            graph.register_initializer(held)
            last = _node("Cast", held, ir.AttrInt64("to", int(ir.DataType.FLOAT)), f"{value.name}/float32", shape)
            nodes.append(last)
            if tensor.transposed:
                order = ir.AttrInt64s("perm", (1, 0))
                last = _node("Transpose", last.outputs[0], order, f"{value.name}/transposed", tensor.shape)
                nodes.append(last)
            value.replace_all_uses_with(last.outputs[0])
        if nodes:
            graph.insert_before(graph[0], nodes)


def _node(op_type: str, value: ir.Value, attribute: ir.Attr, name: str, shape: ir.Shape) -> ir.Node:
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    return ir.Node("", op_type, [value], [attribute], outputs=[output], name=name)


def _is_inner(node: ir.Node, graph: ir.Graph, op_type: str) -> bool:
    """Whether the node is of this type and graph, and its result is no output."""
    standard = node.op_type == op_type and not node.domain
    return standard and node.graph is graph and not node.outputs[0].is_graph_output()


def _to_float32(node: ir.Node) -> bool:
    return node.attributes.get_int("to", 0) == ir.DataType.FLOAT


def _swaps(node: ir.Node, tensor: ir.TensorProtocol) -> bool:
    return len(tensor.shape) == 2 and tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)
