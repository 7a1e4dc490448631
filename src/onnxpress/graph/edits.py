"""Edits that passes make to a graph: weights added and dropped, nodes put in the place of a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.matching import weight
from onnxpress.graph.tensors import concrete_shape


def add_weight(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a new initializer; a number is appended to a name that is taken."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    return _register(graph, unique, tensor)


def add_initializers(graph: ir.Graph, names: Sequence[str], tensors: Sequence[ir.TensorProtocol]) -> list[ir.Value]:
    """Register tensors under these names; an existing initializer of that name is taken to be the same and reused."""
    return [
        graph.initializers[name] if name in graph.initializers else _register(graph, name, tensor)
        for name, tensor in zip(names, tensors, strict=True)
    ]


def add_constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    """The initializer of this name, made of a numpy array where there is none yet."""
    return add_initializers(graph, [name], [ir.tensor(array)])[0]


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    tensor.name = name
    shape = ir.Shape(concrete_shape(tensor))
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused_weights(graph: ir.Graph, values: Sequence[ir.Value | None]) -> None:
    """Remove those of these initializers that nothing reads any more."""
    for value in values:
        if value is not None and weight(value) is not None and not value.uses():
            assert value.name is not None
            graph.initializers.pop(value.name, None)


def drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove an initializer, and the Transpose that read it, once nothing uses them."""
    for node in [node for node, _ in value.uses()]:
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)
    drop_unused_weights(graph, [value])


def replace(old_node: ir.Node, *nodes: ir.Node) -> None:
    """Put `nodes` where a node was; the last one's first output takes over its output, name and uses included."""
    graph = old_node.graph
    assert graph is not None
    old, new = old_node.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(old_node, nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name = None
    graph.remove(old_node, safe=True)


def use_microsoft_operators(model: ir.Model) -> None:
    """Declare the operator set of the fused operators."""
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
