"""Compatibility of layers: whether their weights can be added."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import Block
from onnxpress.graph.conventions import layer_of
from onnxpress.graph.tensors import concrete_shape
from onnxpress.optimizers.depth.removal import renumbered


def layer_weights(block: Block) -> dict[str, ir.Value]:
    """The initializers named after a block's layer, by their names with the layer's number left out."""
    stack, _, index = block.title.rpartition(".")
    found: dict[str, ir.Value] = {}
    for node in block.nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer() and layer_of(value.name) == (stack, int(index)):
                found[renumbered(str(value.name), stack, {int(index): 0})] = value
    return found


def require_compatible(first: Block, second: Block) -> None:
    """Raise UnsupportedModelError, saying what differs, unless two layers differ in their weights' values only."""
    weights, others = layer_weights(first), layer_weights(second)
    where = f"{first.title} and {second.title} cannot be merged"
    hint = "merge layers of one kind only, or method=drop"
    if differing := sorted(set(weights) ^ set(others)):
        raise UnsupportedModelError(f"{where}: only one of them has {differing[0]}", hint=hint)
    for name, value in weights.items():
        shapes = _shape(value), _shape(others[name])
        if shapes[0] != shapes[1]:
            raise UnsupportedModelError(f"{where}: {name} is {list(shapes[0])} in one, {list(shapes[1])} in the other")
        if value.dtype != ir.DataType.FLOAT or others[name].dtype != ir.DataType.FLOAT:
            raise UnsupportedModelError(f"{where}: {name} is not float32")
    for node, twin in zip(_attentions(first), _attentions(second), strict=True):
        mine, theirs = _attributes(node), _attributes(twin)
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise UnsupportedModelError(
                    f"{where}: {name} of their attention is {mine.get(name)} and {theirs.get(name)}", hint=hint
                )
    read, others_read = _shared(first), _shared(second)
    if read != others_read:
        raise UnsupportedModelError(
            f"{where}: they read {', '.join(sorted(read - others_read)) or 'nothing'} and "
            f"{', '.join(sorted(others_read - read)) or 'nothing'} from outside",
            hint=hint,
        )


def layer_signature(block: Block) -> tuple[tuple[str, ...], ...]:
    """The signature of a layer: for each attention, its attributes and the rotary tables and masks that it reads.

    Equal for layers whose attentions are alike, whatever their weights.
    """
    inside = {output for node in block.nodes for output in node.outputs}
    return tuple(
        tuple(
            [f"{name}={value}" for name, value in sorted(_attributes(node).items())]
            + [
                str(value.name)
                for value in node.inputs
                if value is not None
                and value not in inside
                and layer_of(value.name) is None
                and (value.is_initializer() or not value.is_graph_input())
            ]
        )
        for node in _attentions(block)
    )


def _attentions(block: Block) -> list[ir.Node]:
    return [attention.node for attention in block.attentions]


def _attributes(node: ir.Node) -> Mapping[str, str]:
    return {"operator": node.op_type} | {name: str(attribute.value) for name, attribute in node.attributes.items()}


def _shared(block: Block) -> set[str]:
    """Masks, positions and tables that a layer reads: no hidden states, no cache, nothing of its own."""
    values = [value for value in block.inputs if value not in block.hidden and not value.is_graph_input()]
    tables = [
        value
        for attention in block.attentions
        for value in attention.node.inputs
        if value is not None and value.is_initializer()
    ]
    return {str(value.name) for value in [*values, *tables] if layer_of(value.name) is None}


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return concrete_shape(value.const_value)
