"""Rotary embeddings of a part of each head, as GPT-NeoX, StableLM and Phi have them, as one com.microsoft operator.

    concat(RotaryEmbedding(x[..., :n]), x[..., n:])  =>  RotaryEmbedding(x) with rotary_embedding_dim = n

x is [batch, heads, length, head_size]. Positions and the tables of cosines and sines [positions, n / 2] stay.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.matching import is_op, only_reader, producer, slice_bounds
from onnxpress.graph.report import Report
from onnxpress.graph.sizes import size_of


def fuse_partial_rotary(graph: ir.Graph, report: Report) -> None:
    """Replace what matches; leaves dead nodes behind. Wants shapes to be known."""
    for node in list(graph):
        if is_op(node, "Concat") and _joins_features(node) and any(map(_rotation, node.inputs)):
            reason = _fuse(graph, node)
            if reason is None:
                report.match("rotations of a part of each head")
            else:
                report.skip(f"rotary embedding of a part of each head: {reason}")


def _joins_features(concat: ir.Node) -> bool:
    """Whether it joins over the last of four axes: a cache is joined over another."""
    shape = concat.outputs[0].shape
    return shape is not None and len(shape) == 4 and concat.attributes.get_int("axis", 0) in (-1, 3)


def _rotation(value: ir.Value | None) -> ir.Node | None:
    return producer(value, "RotaryEmbedding", MICROSOFT)


def _fuse(graph: ir.Graph, concat: ir.Node) -> str | None:
    """Fuse one embedding, or say why not."""
    rotation = _rotation(concat.inputs[0])
    if rotation is None or len(concat.inputs) != 2:
        return "it is not the first of two parts"
    if only_reader(rotation.outputs[0]) is not concat:
        return "it is read by others, too"
    attributes = dict(rotation.attributes)
    if any(attributes.pop(name).value for name in ("rotary_embedding_dim", "num_heads") if name in attributes):
        return "it rotates a part of the part"
    parts = [producer(value, "Slice") for value in (rotation.inputs[0], concat.inputs[1])]
    x = parts[0].inputs[0] if parts[0] is not None else None
    if x is None or x.shape is None or len(x.shape) != 4 or parts[1] is None or parts[1].inputs[0] is not x:
        return "the parts are no slices of one value"
    bounds = [slice_bounds(part, x) for part in parts if part is not None]
    rotated = bounds[0][1] if bounds[0] is not None else None
    if rotated is None or bounds != [(0, rotated), (rotated, x.shape[-1])]:
        return "the parts are not the first features and the rest"
    heads = size_of(x, -3)
    if not isinstance(heads, int):
        return "number of heads is not known"
    numbers = {"rotary_embedding_dim": rotated, "num_heads": heads}
    attributes |= {name: ir.AttrInt64(name, number) for name, number in numbers.items()}
    fused = ir.Node(MICROSOFT, "RotaryEmbedding", [x, *rotation.inputs[1:]], attributes.values(), name=concat.name)
    fused.metadata_props.update(concat.metadata_props)
    old, new = concat.outputs[0], fused.outputs[0]
    ir.convenience.replace_nodes_and_values(graph, concat, [concat], [fused], [old], [new])
    new.shape = ir.Shape(x.shape.dims)
    return None
