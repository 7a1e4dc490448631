"""Placeholders for products with parameters, and the operators that they become once parameters are bound.

    onnxpress::Linear(x, W[, b])            MatMul or FusedMatMul, Add
    onnxpress::Experts(x, logits, gu, d)    com.microsoft::MoE

See `operators.linear` and `operators.experts`, which write them, and `binding.bind`, which decides the weights' layout.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.conventions import MICROSOFT

PLACEHOLDERS = "onnxpress"
"""Domain of the placeholders."""
ALWAYS = "experts.always"
"""Initializer: true."""


def only_products(value: ir.Value) -> bool:
    """Whether all that use the weight [out, in] are products, which want it as [in, out]."""
    return all(
        use.node.domain == PLACEHOLDERS
        and use.node.op_type == "Linear"
        and use.idx == 1
        and use.node.attributes.get_int("transposed", 0) != 1
        for use in value.uses()
    )


def is_gate_and_up(value: ir.Value) -> bool:
    """Whether a weight is the gate and up projections of experts. Raises UnsupportedModelError if it is something else
    besides."""
    as_such = [
        use.node.domain == PLACEHOLDERS and use.node.op_type == "Experts" and use.idx == 2 for use in value.uses()
    ]
    if any(as_such) and not all(as_such):
        raise UnsupportedModelError(f"{value.name} is a weight of experts and of something else")
    return any(as_such)


def lower(graph: ir.Graph, transposed: Collection[ir.Value]) -> None:
    """Replace all placeholders. transposed: the weights that are stored as [in, out]."""
    for node in list(graph):
        if node.domain == PLACEHOLDERS and node.op_type == "Experts":
            _lower_experts(graph, node)
        elif node.domain == PLACEHOLDERS:
            _lower_linear(graph, node, node.inputs[1] in transposed)
    graph.opset_imports.pop(PLACEHOLDERS, None)


def _lower_experts(graph: ir.Graph, node: ir.Node) -> None:
    """com.microsoft::MoE; its SwiGLU with alpha 1 and beta 0 is silu(gate) · up.

    onnxruntime 1.31 lets the operator write over its input and then reads zeros from it. So something has to need the
    input afterwards: a Where that always takes the output.
    """
    states, logits, gate_up, down = node.inputs
    attributes: dict[str, int | float | str] = {
        "activation_type": "swiglu",
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "swiglu_fusion": 1,
        "k": node.attributes.get_int("k", 1),
        "normalize_routing_weights": node.attributes.get_int("normalized", 0),
    }
    mixture = ir.node("MoE", [states, logits, gate_up, None, down], attributes, domain=MICROSOFT)
    mixture.outputs[0].name = f"{node.outputs[0].name}/mixture"
    always = graph.initializers.get(ALWAYS)
    if always is None:
        always = ir.Value(name=ALWAYS, const_value=ir.tensor(np.array(True), name=ALWAYS), shape=ir.Shape(()))
        always.dtype = ir.DataType.BOOL
        graph.register_initializer(always)
    graph.opset_imports.setdefault(MICROSOFT, 1)
    _replace(graph, node, [mixture, ir.node("Where", [always, mixture.outputs[0], states])])


def _lower_linear(graph: ir.Graph, node: ir.Node, transposed: bool) -> None:
    """MatMul for a weight [in, out], FusedMatMul(transB=1) for one that stays [out, in]."""
    states, weight, *rest = node.inputs
    if transposed or node.attributes.get_int("transposed", 0) == 1:
        product = ir.Node("", "MatMul", [states, weight])
    else:
        attributes = [ir.AttrInt64("transB", 1), ir.AttrFloat32("alpha", 1.0)]
        product = ir.Node(MICROSOFT, "FusedMatMul", [states, weight], attributes)
        graph.opset_imports.setdefault(MICROSOFT, 1)
    product.outputs[0].name = f"{node.outputs[0].name}/product"
    _replace(graph, node, [product, ir.Node("", "Add", [product.outputs[0], rest[0]])] if rest else [product])


def _replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put the nodes `made`, each of the shape of `node`'s output, in its place."""
    output, result = node.outputs[0], made[-1].outputs[0]
    for new in made:
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].shape, new.outputs[0].type = output.shape, output.type
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = output.name
