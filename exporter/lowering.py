"""Parameters to initializers: lazy, in the layout and type that the runtime wants; placeholders to real operators."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxpress.errors import CorruptFileError, UnsupportedModelError
from onnxpress.exporter.weights import FileTensor, TensorSource
from onnxpress.tensors import RowTensor

LINEAR_DOMAIN = "onnxpress"
"""Domain of the placeholder for a product with a parameter; see `operators.linear`."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def bind(model: ir.Model, sources: Mapping[str, TensorSource]) -> None:
    """Give every parameter of the graph its place in the checkpoint and lower the `onnxpress::Linear` placeholders.

    Initializers keep their checkpoint names; a weight that only products use is stored as [in, out], the layout that
    MatMul multiplies with. A weight that the embedding uses too stays [out, in] and is multiplied by
    FusedMatMul(transB=1), so that it is stored once. Floating-point weights become float32. Nothing is read here.
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
        tensor = bound_tensor(source, value.name or "", transposed=value in turned)
        value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
    for node in list(graph):
        if node.domain == LINEAR_DOMAIN:
            _lower_linear(graph, node, node.inputs[1] in turned)
    graph.opset_imports.pop(LINEAR_DOMAIN, None)


def unbound(model: ir.Model) -> list[str]:
    """Names of the parameters that have no values yet."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def bound_tensor(source: TensorSource, name: str, *, transposed: bool = False) -> ir.LazyTensor:
    """A lazy float32 view of a checkpoint tensor (integers keep their type), [in, out] where `transposed`.

    Evaluating it raises CorruptFileError when the weights hold NaN.
    """
    dtype = ir.DataType.FLOAT if source.dtype in _FLOATS else source.dtype
    if source.dtype not in _FLOATS and not source.dtype.is_integer() and source.dtype != ir.DataType.BOOL:
        raise UnsupportedModelError(
            f"{source.name} is stored as {source.dtype}, which onnxpress does not read",
            hint="convert the checkpoint to float32, float16 or bfloat16",
        )
    shape = source.shape[::-1] if transposed else source.shape

    def cast(array: np.ndarray) -> np.ndarray:
        if dtype == ir.DataType.FLOAT:
            array = array.astype(np.float32, copy=False)
            if np.isnan(array.sum()) and np.isnan(array).any():
                raise CorruptFileError(f"{source.name} holds NaN", hint="the checkpoint is damaged; fetch it again")
        return array

    def rows(start: int, stop: int) -> np.ndarray:
        return cast(source.numpy()[:, start:stop]).T if transposed else cast(source.rows(start, stop))

    mapped = isinstance(source, FileTensor)  # of a mapped file, a few columns too cost little
    if shape and (mapped or (source.reads_rows and not transposed)):
        return RowTensor(rows, dtype, shape, name=name)
    evaluate = lambda: ir.Tensor(np.ascontiguousarray(cast(source.numpy()).T if transposed else cast(source.numpy())))  # noqa: E731
    return ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(shape), name=name)


def _only_linear(value: ir.Value) -> bool:
    """Whether all that use the weight are products that want it turned around."""
    return all(
        use.node.domain == LINEAR_DOMAIN and use.idx == 1 and use.node.attributes.get_int("transposed", 0) != 1
        for use in value.uses()
    )


def _lower_linear(graph: ir.Graph, node: ir.Node, turned: bool) -> None:
    """MatMul for a weight [in, out], FusedMatMul(transB=1) for one that stays [out, in]."""
    states, weight, *rest = node.inputs
    output = node.outputs[0]
    if turned or node.attributes.get_int("transposed", 0) == 1:
        product = ir.Node("", "MatMul", [states, weight])
    else:
        attributes = [ir.AttrInt64("transB", 1), ir.AttrFloat32("alpha", 1.0)]
        product = ir.Node("com.microsoft", "FusedMatMul", [states, weight], attributes)
        graph.opset_imports.setdefault("com.microsoft", 1)
    made = [product, ir.Node("", "Add", [product.outputs[0], rest[0]])] if rest else [product]
    for new in made:
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].shape, new.outputs[0].type = output.shape, output.type
    graph.insert_before(node, made)
    result = made[-1].outputs[0]
    product.outputs[0].name = f"{output.name}/product"
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = output.name
