"""Rotary position embeddings that exporters decompose, as com.microsoft RotaryEmbedding.

    x · cos + concat(−x₂, x₁) · sin   with cos, sin of concat(f, f) and x₁, x₂ the halves of x
    =>  RotaryEmbedding(x, positions, cos(f), sin(f))

x is [batch, heads, length, head_size] and f, the angles, [1 or batch, length, head_size / 2]. The operator looks angles
up by position in a table [positions, head_size / 2]; here the table holds just the angles of this run, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import use_microsoft_operators
from onnxpress.graph.matching import constant, is_op, only_reader, other_input, producer, scalar, slice_bounds
from onnxpress.graph.report import Report
from onnxpress.graph.sizes import size_of

Tables = tuple[ir.Value, ir.Value, ir.Value]
"""positions, cosines, sines"""


@dataclass(frozen=True)
class _Wave:
    """Cosine or sine of doubled angles, scaled."""

    angles: ir.Value
    scale: float


def fuse_rotary(model: ir.Model, report: Report) -> None:
    """Replace what matches; leaves dead nodes behind."""
    tables: dict[tuple[ir.Value, float], Tables] = {}
    for node in list(model.graph):
        if is_op(node, "Concat") and producer(node.inputs[0], "Neg") is not None:
            reason = _fuse(model.graph, node, tables)
            if reason is None:
                report.match("RotaryEmbedding")
            else:
                report.skip(f"rotary embedding: {reason}")
    if tables:
        use_microsoft_operators(model)


def _fuse(graph: ir.Graph, rotated: ir.Node, tables: dict[tuple[ir.Value, float], Tables]) -> str | None:
    """Fuse one embedding, or say why not."""
    source = _rotated_source(rotated)
    if source is None:
        return "halves are not constant slices of one value"
    sine_part = only_reader(rotated.outputs[0])
    total = only_reader(sine_part.outputs[0]) if sine_part is not None and is_op(sine_part, "Mul") else None
    if sine_part is None or total is None or not is_op(total, "Add"):
        return "no product with the sine and sum with the other part"
    cosine_part = producer(other_input(total, sine_part.outputs[0]), "Mul")
    if cosine_part is None or source not in cosine_part.inputs:
        return "no product of the same value with the cosine"
    sine = _wave(other_input(sine_part, rotated.outputs[0]), "Sin")
    cosine = _wave(other_input(cosine_part, source), "Cos")
    if sine is None or cosine is None or sine != cosine:
        return "cosine and sine are not of the same doubled angles"
    shape = sine.angles.shape
    batch = size_of(sine.angles, -3)
    if shape is None or len(shape) != 3 or batch is None or batch not in (1, size_of(source, -4)):
        return "batch of the angles is not known"
    key = (sine.angles, sine.scale)
    if key not in tables:
        tables[key] = _tables(graph, total, sine, source, shared=batch == 1)
    fused = ir.node("RotaryEmbedding", [source, *tables[key]], {"interleaved": 0}, domain=MICROSOFT, name=total.name)
    fused.metadata_props.update(total.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, total, [total], [fused], [total.outputs[0]], [fused.outputs[0]])
    return None


def _rotated_source(rotated: ir.Node) -> ir.Value | None:
    """x of concat(−x₂, x₁) over the last axis, x having four dimensions."""
    negative = producer(rotated.inputs[0], "Neg")
    second = producer(negative.inputs[0], "Slice") if negative is not None else None
    first = producer(rotated.inputs[1], "Slice") if len(rotated.inputs) == 2 else None
    if first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    x = first.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 4 or rotated.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    size = x.shape[-1]
    if not isinstance(size, int) or size % 2:
        return None
    return x if slice_bounds(first, x) == (0, size // 2) and slice_bounds(second, x) == (size // 2, size) else None


def _wave(value: ir.Value | None, op_type: str) -> _Wave | None:
    """cos or sin of concat(f, f), perhaps scaled, with a dimension for the heads."""
    head = producer(value, "Unsqueeze")
    axes = constant(head.inputs[1]) if head is not None and len(head.inputs) > 1 else None
    if head is None or axes is None or axes.numpy().tolist() != [1]:
        return None
    value, scale = head.inputs[0], 1.0
    while (node := value.producer() if value is not None else None) is not None and not is_op(node, op_type):
        if is_op(node, "Cast") and node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype:
            value = node.inputs[0]
        elif is_op(node, "Mul") and (factor := scalar(node.inputs[1])) is not None:
            value, scale = node.inputs[0], scale * factor
        else:
            return None
    doubled = producer(node.inputs[0], "Concat") if node is not None else None
    if doubled is None or len(doubled.inputs) != 2 or doubled.inputs[0] is not doubled.inputs[1]:
        return None
    angles = doubled.inputs[0]
    return _Wave(angles, scale) if angles is not None and doubled.attributes.get_int("axis", 0) in (-1, 2) else None


def _tables(graph: ir.Graph, before: ir.Node, wave: _Wave, source: ir.Value, *, shared: bool) -> Tables:
    """Positions, cosines and sines of these angles, computed once for all layers; `shared` by all rows of a batch."""
    assert source.shape is not None
    half = ir.node("Constant", [], {"value_ints": [-1, int(source.shape[-1]) // 2]})  # type: ignore[arg-type]
    flat = ir.node("Reshape", [wave.angles, half.outputs[0]])
    nodes, waves = [half, flat], []
    for op_type in ("Cos", "Sin"):
        nodes.append(ir.node(op_type, [flat.outputs[0]]))
        if wave.scale != 1:
            factor = ir.node("Constant", [], {"value": ir.tensor(np.float32(wave.scale))})
            nodes += [factor, ir.node("Mul", [nodes[-1].outputs[0], factor.outputs[0]])]
        waves.append(nodes[-1].outputs[0])
        waves[-1].type = ir.TensorType(ir.DataType.FLOAT)
        waves[-1].shape = ir.Shape([None, int(source.shape[-1]) // 2])  # type: ignore[arg-type]
    if shared:  # one number is the position of the first token
        nodes.append(ir.node("Constant", [], {"value_ints": [0]}))
    else:
        zero, one = (ir.node("Constant", [], {"value_int": number}) for number in (0, 1))
        rows = ir.node("Shape", [wave.angles], {"start": 0, "end": 2})
        count = ir.node("ReduceProd", [rows.outputs[0]], {"keepdims": 0})
        order = ir.node("Range", [zero.outputs[0], count.outputs[0], one.outputs[0]])
        nodes += [zero, one, rows, count, order, ir.node("Reshape", [order.outputs[0], rows.outputs[0]])]
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0], waves[0], waves[1]
