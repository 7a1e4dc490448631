"""The parameters of a traced graph get their checkpoint tensors, lazy, in the layout and type that runtimes want."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.tracing.lowering import is_gate_and_up, lower, only_products
from onnxpress.graph.floats import round_to_dtype
from onnxpress.graph.storage import HALVES, StoredTensor, WideTensor
from onnxpress.graph.tensors import WeightTensor, apply_to_rows

WeightType = Literal["auto", "float32", "float16", "bfloat16"]
"""How a file holds the weights; "auto": as the checkpoint does."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def bind(model: ir.Model, tensors: Mapping[str, WeightTensor], dtype: WeightType = "float32") -> None:
    """Give every parameter of the graph its checkpoint tensor and lower the placeholders.

    Initializers keep their checkpoint names; a weight that only products use is stored as [in, out], the layout that
    MatMul multiplies with. A weight that the embedding uses too stays [out, in] and is multiplied by
    FusedMatMul(transB=1), so that it is stored once. Of experts, the rows of gate and up alternate, the only order that
    the CPU's MoE takes. Floating-point weights are float32 to all nodes, whatever the `dtype` in which a file will hold
    them. Nothing is read here.
    """
    graph = model.graph
    values = _shared_values(graph, tensors)
    transposed = {value for value in values.values() if only_products(value)}
    for tensor, value in values.items():
        weight = bound_tensor(
            tensor,
            value.name or "",
            transposed=value in transposed,
            interleaved=is_gate_and_up(value),
            dtype=dtype,
        )
        value.const_value, value.shape, value.dtype = weight, weight.shape, weight.dtype
    lower(graph, transposed)


def _shared_values(graph: ir.Graph, tensors: Mapping[str, WeightTensor]) -> dict[WeightTensor, ir.Value]:
    """One initializer for each tensor: tied parameters become one, under the first of the tensor's names."""
    values: dict[WeightTensor, ir.Value] = {}
    for value in list(graph.initializers.values()):
        if value.const_value is not None:
            continue
        first = values.setdefault(tensors[value.name or ""], value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(value.name or "")
    names: dict[WeightTensor, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor, name)
    for tensor, value in values.items():  # the embedding's name rather than the head's
        graph.initializers.pop(value.name or "")
        value.name = names[tensor]
        graph.initializers.add(value)
    return values


def unbound(model: ir.Model) -> list[str]:
    """Names of the parameters that have no values yet."""
    return [name for name, value in model.graph.initializers.items() if value.const_value is None]


def bound_tensor(
    tensor: WeightTensor,
    name: str,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    dtype: WeightType = "float32",
) -> WeightTensor:
    """A checkpoint tensor as a graph's weight: float32 (integers keep their type), [in, out] where `transposed`; where
    `interleaved`, the two halves of axis 1 alternate.

    What the file is to hold is `stored_type`'s. Reading it raises CorruptFileError when it holds NaN or infinity,
    UnsupportedModelError when it does not fit into `dtype`.
    """
    weight = tensor.checked(name)
    if tensor.dtype not in _FLOATS:
        if not tensor.dtype.is_integer() and tensor.dtype != ir.DataType.BOOL:
            raise UnsupportedModelError(
                f"{tensor.name} is stored as {tensor.dtype}, which onnxpress does not read",
                hint="convert the checkpoint to float32, float16 or bfloat16",
            )
        return weight
    stored = stored_type(tensor, dtype)
    if interleaved:
        weight = apply_to_rows(weight, interleave_halves)
    if weight.dtype != stored and (stored in HALVES or weight.dtype == ir.DataType.DOUBLE):
        weight = apply_to_rows(weight, lambda values: round_to_dtype(values, stored.numpy(), name), stored)
    if stored in HALVES:
        return StoredTensor(weight, transposed=transposed)
    return weight if weight.dtype == stored and not transposed else WideTensor(weight, transposed=transposed)


def stored_type(tensor: ir.TensorProtocol, dtype: WeightType) -> ir.DataType:
    """The format in which a file holds a floating-point parameter.

    Vectors (norms, biases) are a ten-thousandth of the bytes, and float32 always, as in .gguf files.
    """
    if len(tensor.shape) < 2 or dtype == "float32" or (dtype == "auto" and tensor.dtype not in HALVES):
        return ir.DataType.FLOAT
    return tensor.dtype if dtype == "auto" else ir.DataType[dtype.upper()]


def interleave_halves(values: Array) -> Array:
    """[experts, 2 · inner, hidden] with row i of the first half before row i of the second."""
    pairs = values.reshape(len(values), 2, -1, *values.shape[2:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(values.shape)
