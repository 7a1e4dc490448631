"""Parameters to initializers: lazy, in the layout and type that the runtime wants; placeholders to real operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.sources.weights import TensorSource
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.floats import narrow, widen
from onnxpress.graph.storage import HALVES, StoredTensor, WideTensor
from onnxpress.graph.tensors import FileTensor, RowTensor, concrete_shape, rows_of

LINEAR_DOMAIN = "onnxpress"
"""Domain of the placeholders for products with parameters; see `operators.linear` and `operators.experts`."""
ALWAYS = "experts.always"
"""Initializer: true."""
WeightType = Literal["auto", "float32", "float16", "bfloat16"]
"""How a file holds the weights; "auto": as the checkpoint does."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def bind(model: ir.Model, sources: Mapping[str, TensorSource], dtype: WeightType = "float32") -> None:
    """Give every parameter of the graph its place in the checkpoint and lower the placeholders.

    Initializers keep their checkpoint names; a weight that only products use is stored as [in, out], the layout that
    MatMul multiplies with. A weight that the embedding uses too stays [out, in] and is multiplied by
    FusedMatMul(transB=1), so that it is stored once. Of experts, the rows of gate and up alternate, the only order that
    the CPU's MoE takes. Floating-point weights are float32 to all nodes, whatever the `dtype` in which a file will hold
    them. Nothing is read here.
    """
    graph = model.graph
    shared: dict[TensorSource, ir.Value] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is not None:
            continue
        source = sources[value.name or ""]
        first = shared.setdefault(source, value)
        if first is not value:  # tied parameters are one initializer
            value.replace_all_uses_with(first)
            graph.initializers.pop(value.name or "")
    canonical: dict[TensorSource, str] = {}
    for name, source in sources.items():
        canonical.setdefault(source, name)
    for source, value in shared.items():  # the embedding's name rather than the head's
        graph.initializers.pop(value.name or "")
        value.name = canonical[source]
        graph.initializers.add(value)
    turned = {value for value in shared.values() if _only_linear(value)}
    for source, value in shared.items():
        tensor = bound_tensor(
            source, value.name or "", transposed=value in turned, interleaved=_is_gate_and_up(value), dtype=dtype
        )
        value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
    for node in list(graph):
        if node.domain == LINEAR_DOMAIN and node.op_type == "Experts":
            _lower_experts(graph, node)
        elif node.domain == LINEAR_DOMAIN:
            _lower_linear(graph, node, node.inputs[1] in turned)
    graph.opset_imports.pop(LINEAR_DOMAIN, None)


def unbound(model: ir.Model) -> list[str]:
    """Names of the parameters that have no values yet."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def bound_tensor(
    source: TensorSource,
    name: str,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    dtype: WeightType = "float32",
) -> ir.LazyTensor:
    """A lazy float32 view of a checkpoint tensor (integers keep their type), [in, out] where `transposed`; where
    `interleaved`, the two halves of axis 1 alternate.

    What the file is to hold is `stored_type`'s. Evaluating it raises CorruptFileError when the weights hold NaN or
    infinity, UnsupportedModelError when they do not fit into `dtype`.
    """
    if source.dtype not in _FLOATS:
        if not source.dtype.is_integer() and source.dtype != ir.DataType.BOOL:
            raise UnsupportedModelError(
                f"{source.name} is stored as {source.dtype}, which onnxpress does not read",
                hint="convert the checkpoint to float32, float16 or bfloat16",
            )
        return source.lazy(name)
    kept = stored_type(source, dtype)
    held = _interleaved(source.lazy(name)) if interleaved else source.lazy(name)
    if held.dtype != kept and (kept in HALVES or held.dtype == ir.DataType.DOUBLE):
        held = _narrowed(held, kept)
    if kept in HALVES:
        return StoredTensor(held, turned=transposed)
    if held.dtype == kept and not transposed:
        return held
    wide = WideTensor(held, turned=transposed)
    if source.shape and (isinstance(held, FileTensor) or (isinstance(held, RowTensor) and not transposed)):
        return wide
    whole = lambda: ir.Tensor(widen(held.numpy().T if transposed else held.numpy()))  # noqa: E731
    return ir.LazyTensor(whole, dtype=kept, shape=wide.shape, name=name)


def stored_type(source: TensorSource, dtype: WeightType) -> ir.DataType:
    """The format in which a file holds a floating-point parameter.

    Vectors (norms, biases) are a ten-thousandth of the bytes, and float32 always, as in .gguf files.
    """
    if len(source.shape) < 2 or dtype == "float32" or (dtype == "auto" and source.dtype not in HALVES):
        return ir.DataType.FLOAT
    return source.dtype if dtype == "auto" else ir.DataType[dtype.upper()]


def _interleaved(held: ir.LazyTensor) -> ir.LazyTensor:
    """[experts, 2 · inner, hidden] with row i of the first half before row i of the second, an expert at a time where
    `held` can be read so."""
    read = rows_of(held)

    def rows(start: int, stop: int) -> Array:
        halves = read(start, stop)
        pairs = halves.reshape(len(halves), 2, -1, *halves.shape[2:]).swapaxes(1, 2)
        return np.ascontiguousarray(pairs).reshape(halves.shape)

    return RowTensor(rows, held.dtype, concrete_shape(held), name=held.name)


def _narrowed(held: ir.LazyTensor, dtype: ir.DataType) -> ir.LazyTensor:
    shape, name = concrete_shape(held), held.name
    if isinstance(held, (FileTensor, RowTensor)) and shape:
        return RowTensor(lambda a, b: narrow(held.rows(a, b), dtype.numpy(), name), dtype, shape, name=name)
    whole = lambda: ir.Tensor(narrow(held.numpy(), dtype.numpy(), name), dtype=dtype)  # noqa: E731
    return ir.LazyTensor(whole, dtype=dtype, shape=ir.Shape(shape), name=name)


def _only_linear(value: ir.Value) -> bool:
    """Whether all that use the weight are products that want it turned around."""
    return all(
        use.node.domain == LINEAR_DOMAIN
        and use.node.op_type == "Linear"
        and use.idx == 1
        and use.node.attributes.get_int("transposed", 0) != 1
        for use in value.uses()
    )


def _is_gate_and_up(value: ir.Value) -> bool:
    """Whether a weight is the gate and up projections of experts. Raises UnsupportedModelError if it is something else
    besides."""
    wanted = [
        use.node.domain == LINEAR_DOMAIN and use.node.op_type == "Experts" and use.idx == 2 for use in value.uses()
    ]
    if any(wanted) and not all(wanted):
        raise UnsupportedModelError(f"{value.name} is a weight of experts and of something else")
    return any(wanted)


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


def _lower_linear(graph: ir.Graph, node: ir.Node, turned: bool) -> None:
    """MatMul for a weight [in, out], FusedMatMul(transB=1) for one that stays [out, in]."""
    states, weight, *rest = node.inputs
    if turned or node.attributes.get_int("transposed", 0) == 1:
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
