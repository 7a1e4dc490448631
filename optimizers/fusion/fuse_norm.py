"""Normalisations that exporters decompose, found from their square root.

    x / sqrt(mean(x²) + ε) · scale                                =>  SimplifiedLayerNormalization
    (x − mean(x)) / sqrt(mean((x − mean(x))²) + ε) · scale + bias  =>  LayerNormalization

SimplifiedLayerNormalization is onnxruntime's RMSNormalization; it lives in ONNX's own domain by an old mistake.
Covers what onnxscript's rules do not: `1 / sqrt(…)`, division by the root, squares as products, axes as an attribute,
and Casts in between that change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.graph.matching import constant, is_close, is_op, only_reader, other_input, producer, scalar, weight
from onnxpress.graph.report import Report


@dataclass(frozen=True)
class _Norm:
    """x, divided by its root mean square."""

    source: ir.Value
    epsilon: float
    centred: bool
    normalised: ir.Node


def fuse_norms(model: ir.Model, report: Report) -> None:
    """Replace decomposed normalisations over the last axis; leaves dead nodes behind."""
    for graph in model.graphs():
        for node in list(graph):
            if is_op(node, "Sqrt"):
                _fuse(graph, node, report)


def _fuse(graph: ir.Graph, root: ir.Node, report: Report) -> None:
    norm = _match(root)
    if norm is None:
        return
    scaled = _past_casts(norm.normalised)
    product = only_reader(scaled.outputs[0])
    if not is_op(product, "Mul"):
        report.skip("normalisation without a scale")
        return
    assert product is not None
    scale = other_input(product, scaled.outputs[0])
    if not _is_vector(scale):
        report.skip("scale of a normalisation is not a constant vector")
        return
    last, inputs = product, [norm.source, scale]
    if norm.centred:
        shift = only_reader(product.outputs[0])
        bias = other_input(shift, product.outputs[0]) if is_op(shift, "Add") and shift is not None else None
        if bias is not None and shift is not None and _is_vector(bias):
            last, inputs = shift, [*inputs, bias]
    fused = ir.node(
        "LayerNormalization" if norm.centred else "SimplifiedLayerNormalization",
        inputs,
        {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1},
        name=last.name,
    )
    fused.metadata_props.update(last.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, last, [last], [fused], [last.outputs[0]], [fused.outputs[0]])
    report.match(fused.op_type)


def _match(root: ir.Node) -> _Norm | None:
    """The norm that a square root belongs to, if it is the root of a mean square plus epsilon."""
    total = producer(root.inputs[0], "Add")
    if total is None:
        return None
    left, right = total.inputs
    mean, epsilon = (left, scalar(right)) if scalar(right) is not None else (right, scalar(left))
    square = _mean_source(mean)
    if epsilon is None or square is None:
        return None
    x = _square_source(square)
    if x is None:
        return None
    normalised = _quotient(root, x)
    if normalised is None:
        return None
    centring = producer(x, "Sub")
    centred = centring is not None and _mean_source(centring.inputs[1]) is centring.inputs[0]
    source = centring.inputs[0] if centring is not None and centred else _before_casts(x)
    assert source is not None
    return _Norm(source, epsilon, centred, normalised)


def _mean_source(value: ir.Value | None) -> ir.Value | None:
    """x, if `value` is its mean over the last axis, that axis kept."""
    node = producer(value, "ReduceMean")
    if node is None or not node.attributes.get_int("keepdims", 1):
        return None
    axes = tuple(node.attributes.get_ints("axes", ()))
    if len(node.inputs) > 1:
        tensor = constant(node.inputs[1])
        axes = tuple(int(axis) for axis in np.ravel(tensor.numpy())) if tensor is not None else ()
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else None
    return source if axes == (-1,) or (rank is not None and axes == (rank - 1,)) else None


def _square_source(value: ir.Value) -> ir.Value | None:
    power = producer(value, "Pow")
    if power is not None:
        return power.inputs[0] if is_close(power.inputs[1], 2.0) else None
    product = producer(value, "Mul")
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _quotient(root: ir.Node, x: ir.Value) -> ir.Node | None:
    """The node that computes x / sqrt or x · (1 / sqrt)."""
    reader = only_reader(root.outputs[0])
    if is_op(reader, "Div") and reader is not None:
        if reader.inputs[0] is x:
            return reader
        inverse = reader if is_close(reader.inputs[0], 1.0) else None
    else:
        inverse = reader if is_op(reader, "Reciprocal") else None
    if inverse is None:
        return None
    product = only_reader(inverse.outputs[0])
    if is_op(product, "Mul") and product is not None and other_input(product, inverse.outputs[0]) is x:
        return product
    return None


def _is_idle_cast(node: ir.Node | None) -> bool:
    """A Cast to the type that its input has."""
    if node is None or not is_op(node, "Cast"):
        return False
    value = node.inputs[0]
    return value is not None and value.dtype is not None and node.attributes.get_int("to", 0) == value.dtype


def _past_casts(node: ir.Node) -> ir.Node:
    reader = only_reader(node.outputs[0])
    return _past_casts(reader) if reader is not None and _is_idle_cast(reader) else node


def _before_casts(value: ir.Value) -> ir.Value:
    node = value.producer()
    if node is None or not _is_idle_cast(node) or node.inputs[0] is None:
        return value
    return _before_casts(node.inputs[0])


def _is_vector(value: ir.Value | None) -> bool:
    tensor = weight(value)
    return tensor is not None and len(tensor.shape) == 1
