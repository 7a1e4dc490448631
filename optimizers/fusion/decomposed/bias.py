"""The masks that graphs build, as the biases that fused attention takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.calibration.subgraphs import extract_subgraph, session_of
from onnxpress.graph.sizes import Size, size_of
from onnxpress.optimizers.fusion.decomposed.split_heads import NotFused

LOWEST = float(np.finfo(np.float32).min) / 2
HIDDEN = -1e9
"""What is added to the score of a key at most if no part of it is to be seen."""
PAST_AND_NEW = ((0, 5), (4, 1), (3, 4))
"""Lengths at which a mask is looked at; a graph without a cache has no past."""
_AXES: dict[str, tuple[str, ...]] = {"input_ids": ("batch", "new"), "attention_mask": ("batch", "total")}
_FEEDABLE = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.FLOAT)


def attention_bias(graph: ir.Graph, mask: ir.Value, rows: ir.Value, before: ir.Node, finite: bool) -> ir.Value:
    """The mask with as many rows as there are queries, int64 [1]; finite if asked for. Returns [1 or batch, 1 or heads,
    length, keys]."""
    one = ir.node("Constant", [], {"value_ints": [1]})
    ones = one.outputs[0]
    nodes = [one, ir.node("Concat", [ones, ones, rows, ones], {"axis": 0})]
    sizes, bounded = nodes[-1].outputs[0], mask
    if finite:
        lowest = ir.node("Constant", [], {"value_float": LOWEST})
        nodes += [lowest, ir.node("Max", [mask, lowest.outputs[0]])]
        bounded = nodes[-1].outputs[0]
    nodes.append(ir.node("Expand", [bounded, sizes]))
    graph.insert_before(before, nodes)
    bias, heads = nodes[-1].outputs[0], size_of(mask, -3)
    bias.type = mask.type
    bias.shape = ir.Shape([None, heads if isinstance(heads, int) else None, None, None])
    return bias


def require_causal(model: ir.Model, mask: ir.Value) -> None:
    """Raise NotFused unless a mask hides every later token from a token that is no padding.

    It is computed from inputs alone, at a few lengths and with padding on either side, and looked at: however a graph
    builds it, GroupQueryAttention hides later tokens by itself, which must not be more than the graph hides.
    """
    dimensions, feeds = _dimensions(model.graph), {str(value.name): value for value in _cut(mask)}
    part = extract_subgraph(model, {name: _type(value) for name, value in feeds.items()}, [str(mask.name)])
    with session_of(part) as session:
        names = [one.name for one in session.get_inputs()]
        for past, new in PAST_AND_NEW if "past" in dimensions.values() else PAST_AND_NEW[:1]:
            for padding in (slice(0), slice(0, 2), slice(past + new - 1, None)):
                visible = np.ones((2, past + new), np.int64)
                visible[1, padding] = 0
                found = session.run(None, {one: _feed(feeds[one], dimensions, visible, past, new) for one in names})[0]
                _check(found, visible, past, new)


def _check(mask: NDArray[np.floating], visible: NDArray[np.int64], past: int, new: int) -> None:
    if mask.ndim != 4 or mask.shape[-1] != past + new or mask.shape[-2] not in (1, new) or mask.shape[0] not in (1, 2):
        raise NotFused(f"its mask is {list(mask.shape)} for {len(visible)} rows of {new} tokens after {past}")
    later = np.arange(past + new)[None] > np.arange(new)[:, None] + past
    looked_at = later & visible[:, None, past:, None].astype(bool)
    if np.any((mask > HIDDEN) & looked_at):
        raise NotFused("its keys are repeated, and its mask shows later tokens")


def _cut(mask: ir.Value) -> Iterator[ir.Value]:
    """The inputs of the graph that a mask depends on, and what it asks for nothing but its shape. Raises NotFused for
    inputs whose values are not known beforehand."""
    queue, seen, asked = [mask], set[ir.Value](), dict[ir.Value, None]()
    while queue:
        value = queue.pop()
        if value in seen or value.is_initializer():
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            if value.name not in ("attention_mask", "position_ids"):
                raise NotFused(f"its mask depends on {value.name}")
            yield value
        elif node.op_type == "Shape" and None not in _sizes(node.inputs[0]):
            assert node.inputs[0] is not None
            asked[node.inputs[0]] = None
        else:
            queue += [one for one in node.inputs if one is not None]
    yield from (value for value in asked if value not in seen)


def _type(value: ir.Value) -> ir.DataType:
    if value.dtype not in _FEEDABLE:
        raise NotFused(f"its mask depends on {value.name}")
    return value.dtype


def _dimensions(graph: ir.Graph) -> dict[Size | None, str]:
    """Tell what dimensions stand for, by their names: `batch`, `new`, `past` or `total`."""
    found: dict[Size | None, str] = {}
    for value in graph.inputs:
        axes = _AXES.get(str(value.name), ())
        if not axes and value.shape is not None and len(value.shape) == 4 and str(value.name).startswith("past"):
            axes = ("batch", "", "past", "")
        for axis, kind in enumerate(axes, -len(axes)):
            size = size_of(value, axis)
            if kind and isinstance(size, str):
                found.setdefault(size, kind)
    return found


def _feed(
    value: ir.Value, dimensions: dict[Size | None, str], visible: NDArray[np.int64], past: int, new: int
) -> NDArray[np.generic]:
    """Make an array for a value: real masks and positions, zeros of the right shape for all else."""
    if value.name == "attention_mask":
        return visible
    if value.name == "position_ids":
        return np.maximum(np.cumsum(visible, axis=1) - 1, 0)[:, past:]
    lengths = {"batch": len(visible), "new": new, "past": past, "total": past + new}
    sizes = [lengths.get(dimensions.get(size, ""), size) for size in _sizes(value)]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise NotFused(f"its mask depends on the shape {value.shape} of {value.name}")
    return np.zeros(known, _type(value).numpy())


def _sizes(value: ir.Value | None) -> list[Size | None]:
    if value is None or value.shape is None:
        return [None]
    return [size_of(value, axis) for axis in range(-len(value.shape), 0)]
