"""Weights and arithmetic in float16.

    float32 initializers -> float16, converted when they are written
    nodes that must stay in float32 -> between Casts

Inputs and outputs of the graph keep their types, unless `io` says otherwise. IEEE 754 binary16: largest number 65504,
11 bits of significand. A weight beyond that is an error; a constant that only means "minus infinity" (an attention
mask) is brought to the largest number instead.

Halves memory. On x86 CPUs onnxruntime computes in float32 between casts that it inserts itself, so that it is not
faster there; arm64, GPUs and NPUs have float16 arithmetic.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.arrays import Array
from onnxpress.errors import UsageError
from onnxpress.graph.edits import add_weight, drop_unused_weights
from onnxpress.graph.floats import round_to_dtype
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import apply_to_rows
from onnxpress.optimizers.base import Context, Pass

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = 65504.0

Part = Literal["norms", "softmax", "logits"]
_PARTS: dict[str, frozenset[str]] = {
    "norms": frozenset(
        {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"}
        | {"SkipSimplifiedLayerNormalization", "ReduceMean", "Pow", "Sqrt", "Reciprocal", "GroupNormalization"}
    ),
    "softmax": frozenset({"Softmax", "LogSoftmax"}),
    "logits": frozenset(),
}
_ALWAYS_FLOAT32 = frozenset(
    {
        "Range",
        "CumSum",
        "Sin",
        "Cos",
        "Resize",
        "RandomNormal",
        "RandomUniform",
        "RandomNormalLike",
        "RandomUniformLike",
    }
    | {"DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    | {"If", "Loop", "Scan"}
)
"""Positions do not fit into 11 bits, quantized kernels want float32 scales, and subgraphs see values from outside."""


class Float16(Pass):
    """Convert a graph to float16.

    Keeps in float32: what `keep` names, rotary angles with all that leads to them, and quantized products.
    """

    name: ClassVar[str] = "float16"
    exact: ClassVar[bool] = False

    def __init__(
        self,
        keep: Collection[Part] = ("norms", "softmax"),
        block: Collection[str] = (),
        io: Literal["float32", "float16"] = "float32",
    ) -> None:
        """
        Args:
            keep: parts left in float32: `norms`, `softmax`, and `logits`, the product that ends the graph.
            block: types of operators left in float32 besides, such as `Conv`.
            io: type of floating-point inputs and outputs of the graph, the key/value cache among them.
        """
        super().__init__()
        if unknown := set(keep) - set(_PARTS):
            message = f"float16: keep={sorted(unknown)[0]!r} is none of {', '.join(_PARTS)}."
            raise UsageError(message, hint="see onnxpress list passes float16")
        if io not in ("float32", "float16"):
            message = f"float16: io={io!r} is neither float32 nor float16."
            raise UsageError(message, hint="see onnxpress list passes float16")
        self.block = _ALWAYS_FLOAT32.union(block, *(_PARTS[part] for part in keep))
        self.keep_logits = "logits" in keep
        self.io = HALF if io == "float16" else FLOAT

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        graph = model.graph
        _infer_types(graph)
        kept = self._kept_nodes(graph)
        full = [value for value in graph.initializers.values() if value.dtype == FLOAT]
        if not any(use.node not in kept for value in full for use in value.uses()):
            report.skip("no float32 weights to convert")
            return
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        halves: dict[ir.Value, ir.Value] = {}
        nodes = list(graph)
        for port in graph.inputs:
            if port.dtype == FLOAT:
                port.type = ir.TensorType(self.io)
        for node in nodes:
            wanted = FLOAT if node in kept else HALF
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype not in (FLOAT, HALF) or value.dtype == wanted:
                    continue
                if value.is_initializer() and not value.is_graph_input():
                    if value not in halves:
                        halves[value] = _half_weight(graph, value)
                        report.match("weights")
                    node.replace_input_with(index, halves[value])
                else:
                    node.replace_input_with(index, _cast(graph, node, value, wanted, casts))
            if wanted == HALF:
                if any(value.dtype == FLOAT for value in node.outputs):
                    report.match("nodes")
                _make_half(node)
        drop_unused_weights(graph, list(halves))
        for original, half in halves.items():
            if original.graph is None and original.name is not None:  # it is gone, and its name free
                graph.initializers.pop(str(half.name))
                half.name = original.name
                graph.register_initializer(half)
        self._restore_outputs(graph, casts)

    def _kept_nodes(self, graph: ir.Graph) -> set[ir.Node]:
        """Nodes that stay in float32: the blocked ones, and all that leads to an angle."""
        kept = {node for node in graph if node.op_type in self.block}
        stack = [node for node in kept if node.op_type in ("Sin", "Cos")]
        while stack:
            for before in stack.pop().predecessors():
                if before not in kept:
                    kept.add(before)
                    stack.append(before)
        if self.keep_logits:
            for value in graph.outputs:
                node = value.producer()
                if node is not None and value.name == "logits":
                    kept.add(node)
        return kept

    def _restore_outputs(self, graph: ir.Graph, casts: dict[tuple[ir.Value, ir.DataType], ir.Value]) -> None:
        """Outputs of the graph get their type and name back behind a Cast."""
        for index, value in enumerate(graph.outputs):
            if value.dtype in (FLOAT, HALF) and value.dtype != self.io and value.producer() is not None:
                name, value.name = value.name, f"{value.name}.{_short(value.dtype)}"
                cast = ir.node("Cast", [value], {"to": int(self.io)}, name=f"{name}.Cast")
                result = cast.outputs[0]
                result.name, result.shape, result.type = name, value.shape, ir.TensorType(self.io)
                graph.append(cast)
                graph.outputs[index] = result


def _infer_types(graph: ir.Graph) -> None:
    """Set types that a graph does not tell: that of the first typed input, but for the known exceptions."""
    for node in graph:
        for value in node.outputs:
            if value.dtype is None:
                value.type = ir.TensorType(_guess_type(node))


def _guess_type(node: ir.Node) -> ir.DataType:
    if node.op_type in ("Cast", "RandomNormalLike") and "to" in node.attributes:
        return ir.DataType(node.attributes.get_int("to", int(FLOAT)))
    if node.op_type in ("Shape", "Size", "NonZero", "ArgMax", "ArgMin"):
        return ir.DataType.INT64
    if node.op_type in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "IsNaN"):
        return ir.DataType.BOOL
    if node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    inputs = node.inputs[1:] if node.op_type == "Where" else node.inputs
    return next((value.dtype for value in inputs if value is not None and value.dtype is not None), FLOAT)


def _make_half(node: ir.Node) -> None:
    """The node computes in float16: the types of its outputs, and what its attributes say of types."""
    if node.op_type == "Cast" and node.attributes.get_int("to", 0) == FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    for name in ("value", "value_float"):
        attribute = node.attributes.get(name)
        if attribute is None:
            continue
        if name == "value_float":
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.tensor(_to_half(np.float32(attribute.value), name, True))
            )
        elif attribute.as_tensor().dtype == FLOAT:
            half = _to_half(attribute.as_tensor().numpy(), str(node.outputs[0].name), True)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(half))
    for value in node.outputs:
        if value.dtype == FLOAT:
            value.type = ir.TensorType(HALF)  # types are shared between copies of a graph: never edit them


def _cast(
    graph: ir.Graph,
    reader: ir.Node,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
) -> ir.Value:
    """`value` in another type; one Cast for all readers, placed before the first."""
    if (value, dtype) not in casts:
        node = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}.{_short(dtype)}.Cast")
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{value.name}.{_short(dtype)}", value.shape, ir.TensorType(dtype)
        graph.insert_before(reader, node)
        casts[value, dtype] = result
    return casts[value, dtype]


def _short(dtype: ir.DataType | None) -> str:
    return "float16" if dtype == HALF else "float32"


def _half_weight(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The float16 twin of a weight, converted when it is written."""
    tensor = value.const_value
    assert tensor is not None
    name = str(value.name)
    half: ir.TensorProtocol
    if tensor.size <= 64:
        half = ir.tensor(_to_half(tensor.numpy(), name, tensor.size == 1))
    else:
        half = apply_to_rows(tensor, lambda values: _to_half(values, name), HALF)
    return add_weight(graph, f"{name}.float16", half)


def _to_half(array: Array | np.float32, name: str, may_clip: bool = False) -> Array:
    """Round to float16. A finite number that becomes infinite is an error, unless `may_clip`."""
    values = np.asarray(array)
    return round_to_dtype(np.clip(values, -LARGEST, LARGEST) if may_clip else values, np.float16, name)
