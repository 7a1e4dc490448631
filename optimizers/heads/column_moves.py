"""Which columns of a product reach another node, where nodes in between only move them.

What moves columns is run on their numbers: whatever Split, Slice, Gather, Reshape and Transpose do together, numbers
tell where each feature came from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Indices
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.matching import constant

PLACES = (2, 3)
"""Rows and tokens that are tried: columns have to move in the same way for all of them."""


@dataclass(frozen=True)
class Columns:
    """The columns of a product that a node reads."""

    columns: Indices
    """[features]"""
    rotation: ir.Node | None
    """RotaryEmbedding of heads on the way, if there is one."""
    flat: bool
    """Whether it reads [batch, length, heads · head_dim], not [batch, heads, length, head_dim]."""
    nodes: tuple[ir.Node, ...]
    """All nodes on the way, the nearest to the product first."""


def columns_at(value: ir.Value | None, source: ir.Value, width: int) -> Columns:
    """Find which column of `source` [batch, length, width] arrives where in a value [batch, length, features].

    Raises UnsupportedModelError, naming the operator, where anything else is computed on the way.
    """
    numbers = np.arange(int(np.prod(PLACES)) * width).reshape(*PLACES, width)
    arrays: dict[ir.Value, Indices] = {source: numbers}
    nodes, rotation, before = _way(value, source), None, numbers
    for node in nodes:
        assert node.inputs[0] is not None
        moved = arrays[node.inputs[0]]
        if node.op_type == "RotaryEmbedding":
            if rotation is not None:
                raise UnsupportedModelError("heads are rotated twice")
            rotation, before = node, moved
        arrays.update(zip(node.outputs, _move(node, moved), strict=True))
    assert value is not None
    reached = arrays[value]
    flat = before.ndim == 3
    if rotation is not None and not flat:  # heads have to be together again as they were
        before = before.transpose(0, 2, 1, 3).reshape(*before.shape[:1], before.shape[2], -1)
    columns = reached.reshape(-1)[: reached.shape[-1]]
    if (
        reached.shape != (*PLACES, len(columns))
        or (reached != numbers[..., columns]).any()
        or (rotation is not None and (before.shape != reached.shape or (before != reached).any()))
    ):
        raise UnsupportedModelError(f"features of tokens are mixed between {source.name} and {value.name}")
    return Columns(columns, rotation, flat, tuple(nodes))


def _way(value: ir.Value | None, source: ir.Value) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    while value is not source:
        node = value.producer() if value is not None else None
        if node is None or not node.inputs or not (node.op_type in _MOVES or node.op_type == "RotaryEmbedding"):
            raise UnsupportedModelError(f"{node.op_type if node else 'an input'} stands between {source.name} and it")
        nodes.insert(0, node)
        value = node.inputs[0]
    return nodes


def _move(node: ir.Node, x: Indices) -> list[Indices]:
    """Compute what a node makes of numbers; a rotation leaves them where they are."""
    if node.op_type == "RotaryEmbedding":
        return [x]
    operands = [_ints(node, index) for index in range(1, len(node.inputs))]
    axis = int(node.attributes["axis"].value) if "axis" in node.attributes else 0
    if node.op_type == "Transpose":
        return [x.transpose(node.attributes["perm"].value)]
    if node.op_type == "Reshape":
        sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(operands[0].tolist())]
        return [x.reshape(sizes)]
    if node.op_type == "Gather":
        return [np.take(x, operands[0].reshape(_rank(node.inputs[1])), axis)]
    if node.op_type == "Split":
        if not operands:
            return list(np.split(x, len(node.outputs), axis))
        return np.split(x, np.cumsum(operands[0])[:-1].tolist(), axis)
    starts, ends, axes, *steps = operands
    index: list[slice] = [slice(None)] * x.ndim
    for place, (start, end, along) in enumerate(zip(starts, ends, axes, strict=True)):
        index[int(along)] = slice(int(start), int(end), int(steps[0][place]) if steps else 1)
    return [x[tuple(index)]]


_MOVES = frozenset({"Transpose", "Reshape", "Gather", "Split", "Slice"})


def _ints(node: ir.Node, index: int) -> Indices:
    tensor = constant(node.inputs[index])
    if tensor is None:
        raise UnsupportedModelError(f"{node.op_type} is by sizes that are computed in the graph")
    return np.asarray(tensor.numpy(), np.int64).reshape(-1)


def _rank(value: ir.Value | None) -> tuple[int, ...]:
    tensor = constant(value)
    assert tensor is not None
    return tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]
