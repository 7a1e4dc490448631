"""The weights of float graphs by their roles, for a checkpoint to be written from."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.writing.placed_weights import PlacedWeight, Role
from onnxpress.graph.anatomy import Anatomy, anatomy_of
from onnxpress.graph.anatomy.layers import NORMS, scope_of
from onnxpress.graph.anatomy.products import find_products
from onnxpress.graph.conventions import ROTARY_TABLES
from onnxpress.graph.linear import match_linear
from onnxpress.graph.tensors import concrete_shape

_QUERIES = ("GroupQueryAttention", "MultiHeadAttention", "Attention")


def place_weights(graphs: Iterable[ir.Model]) -> list[PlacedWeight]:
    """Every floating-point weight of the graphs of a model, each once, in graph order.

    Raises UnsupportedModelError for a weight that two graphs have in two shapes.
    """
    placed: dict[str, PlacedWeight] = {}
    for model in graphs:
        for weight in _of_graph(model):
            first = placed.setdefault(weight.name, weight)
            if concrete_shape(first.tensor) != concrete_shape(weight.tensor):
                raise UnsupportedModelError(
                    f"{weight.name} is {list(concrete_shape(first.tensor))} in one graph of the model and "
                    f"{list(concrete_shape(weight.tensor))} in another"
                )
    return list(placed.values())


def _of_graph(model: ir.Model) -> list[PlacedWeight]:
    weights: dict[str, PlacedWeight] = {}
    anatomy = anatomy_of(model)
    scales = _scales(anatomy)
    products = list(find_products(model.graph))
    for product in products:
        linear = match_linear(product.node)
        tensor = product.weight.const_value
        if linear is None or tensor is None:
            continue
        scale, queries = scales.get(product.name, (None, 0))
        is_head = anatomy.head is not None and product.node is anatomy.head.node
        if product.name not in weights:
            weights[product.name] = PlacedWeight(
                product.name,
                "product",
                scope_of(product.node),
                tensor,
                linear.transposed,
                scale,
                queries,
                is_head,
                product.bias is not None,
            )
        _add(weights, product.bias, "bias", product.node)
    for node in model.graph:
        if node.op_type in NORMS:
            gain = 2 if node.op_type.startswith("Skip") else 1
            _add(weights, _input(node, gain), "gain", node)
            if node.op_type.endswith("LayerNormalization") and "Simplified" not in node.op_type:
                _add(weights, _input(node, gain + 1), "shift", node)
        elif node.op_type == "MoE":
            _add(weights, _input(node, 2), "experts", node)
    for value in model.graph.initializers.values():
        reader = next((node for node, _ in value.uses()), None)
        if reader is not None and not str(value.name).endswith(ROTARY_TABLES):
            _add(weights, value, "other", reader)
    return list(weights.values())


def _scales(anatomy: Anatomy) -> dict[str, tuple[float, int]]:
    """The factor of an attention's scores, and the number of its queries, by the product that makes
    these."""
    found = {}
    for block in anatomy.blocks:
        for attention in block.attentions:
            if attention.node.op_type not in _QUERIES or attention.heads is None or attention.head_dim is None:
                continue
            given = attention.node.attributes.get("scale")
            scale = (float(given.value) if given is not None else 0.0) or float(attention.head_dim**-0.5)
            found[attention.query.name] = (scale, attention.heads * attention.head_dim)
    return found


def _add(found: dict[str, PlacedWeight], value: ir.Value | None, role: Role, node: ir.Node) -> None:
    """Note a weight, unless it is known: its first role counts.

    A single number is a parameter by its name alone, such as CLIP's `logit_scale`: modules have constants, too.
    """
    tensor = value.const_value if value is not None and value.is_initializer() else None
    if value is None or tensor is None or not tensor.dtype.is_floating_point():
        return
    single = tensor.size < 2
    if not single or role == "other":
        found.setdefault(
            str(value.name), PlacedWeight(str(value.name), role, None if single else scope_of(node), tensor)
        )


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None
