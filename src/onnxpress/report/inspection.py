"""The contents of a graph: parameters, bytes and number formats by layer, operators, cache and memory.

Read from shapes, dtypes and attributes alone; no weight is ever loaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from onnxpress.graph.conventions import ROTARY_TABLES, layer_index
from onnxpress.graph.linear import OFFSETS
from onnxpress.graph.storage import stored

_NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.DOUBLE: "fp64",
}
_DYNAMIC = {"MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QAttention"}
_BLOCKS = {"MatMulNBits": (1,), "GatherBlockQuantized": (0,), "QMoE": (2, 5)}
"""Operators on quantized blocks, and which inputs are codes."""
_PLANE = re.compile(r"\.q(\d)b\d+\.plane\d$")
"""Ends the names of parts of codes, see `optimizers/block_operands.py`."""
_FOLDED = ("Cast", "Mul", "Reshape", "BitShift", "BitwiseAnd", "BitwiseOr", "Add", "Transpose")
_EMBEDDING = ("embed", "wte", "wpe", "word_embeddings", "position_embeddings")
_HEAD = ("lm_head", "embed_out", "output_projection")


@dataclass
class WeightSize:
    """The size of a part of the model's weights.

    `parameters` are numbers of the original model: scales are bytes, not parameters.
    """

    parameters: int = 0
    bytes: int = 0

    def add(self, other: WeightSize) -> None:
        """Count another part in."""
        self.parameters += other.parameters
        self.bytes += other.bytes


@dataclass
class LayerSummary:
    """Weights of one transformer block, or of what lies outside of the blocks."""

    name: str
    """`layer 7`, `embedding`, `head`, `embedding and head` (tied) or `other`."""
    total: WeightSize = field(default_factory=WeightSize)
    formats: dict[str, WeightSize] = field(default_factory=dict)
    """By number format: `fp32`, `fp16`, `int8 dynamic`, `8-bit blocks of 32`, `4-bit blocks of 128`, `constants`."""


@dataclass(frozen=True)
class Port:
    """An input or output of the graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that running the graph takes on a CPU: batch 1, a prompt that fills the context."""

    weights: int
    kv_cache: int
    activations: int
    """The largest set of values that one operator reads and writes, with the scores inside of fused attention."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


@dataclass(frozen=True)
class Inspection:
    """The outcome of `inspect_graph`."""

    total: WeightSize
    formats: Mapping[str, WeightSize]
    layers: tuple[LayerSummary, ...]
    operators: Mapping[str, int]
    """Nodes by operator, most frequent first; those that are not ONNX's own with their domain: `com.microsoft.X`."""
    opsets: Mapping[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kv_cache_bytes_per_token: int
    _weight_bytes: int = field(repr=False, default=0)
    """In memory, where weights that the file holds in half the bytes are float32."""
    _values: tuple[tuple[tuple[tuple[int | str, ...], int], ...], ...] = field(repr=False, default=())
    _attention_heads: int = field(repr=False, default=0)
    _batch: frozenset[int | str] = field(repr=False, default=frozenset())

    def memory(self, context_length: int) -> MemoryEstimate:
        """Estimate the memory for a context of this many tokens; the runtime itself (about 50 MB) comes on top."""
        scores = self._attention_heads * context_length**2 * 4
        largest = max(
            (sum(self._elements(shape, context_length) * width for shape, width in node) for node in self._values),
            default=0,
        )
        return MemoryEstimate(self._weight_bytes, self.kv_cache_bytes_per_token * context_length, max(largest, scores))

    def _elements(self, shape: tuple[int | str, ...], context_length: int) -> int:
        """Elements of a value: named dimensions are 1 for the batch and the context length otherwise."""
        return math.prod(d if isinstance(d, int) else 1 if d in self._batch else context_length for d in shape)


def inspect_graph(model: ir.Model) -> Inspection:
    """Summarise a graph."""
    layers: dict[str, LayerSummary] = {}
    formats: dict[str, WeightSize] = {}
    total = WeightSize()
    resident = 0
    for value, size, form in _weights(model):
        resident += value.const_value.nbytes if value.const_value is not None else 0
        layer = layers.setdefault(name := _layer_name(value), LayerSummary(name))
        of_format = [sizes.setdefault(form, WeightSize()) for sizes in (formats, layer.formats)]
        for target in (total, layer.total, *of_format):
            target.add(size)
    nodes = [node for graph in model.graphs() for node in graph]
    operators = Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes)
    return Inspection(
        total=total,
        formats=dict(sorted(formats.items(), key=lambda item: -item[1].bytes)),
        layers=tuple(sorted(layers.values(), key=lambda layer: _layer_order(layer.name))),
        operators=dict(operators.most_common()),
        opsets=dict(model.opset_imports),
        inputs=tuple(map(_port, model.graph.inputs)),
        outputs=tuple(map(_port, model.graph.outputs)),
        kv_cache_bytes_per_token=sum(
            math.prod(d for d in _port(value).shape if isinstance(d, int)) * value.dtype.bitwidth // 8
            for value in model.graph.inputs
            if value.name is not None and value.name.startswith("past_key_values.") and value.dtype is not None
        ),
        _weight_bytes=resident,
        _values=tuple(
            tuple(
                (_port(value).shape, value.dtype.bitwidth // 8)
                for value in {*node.inputs, *node.outputs}
                if value is not None
                and value.const_value is None
                and value.shape is not None
                and value.dtype not in (None, ir.DataType.STRING)
                and value.dtype is not None
            )
            for node in nodes
        ),
        _batch=frozenset(_port(value).shape[0] for value in model.graph.inputs if value.shape),
        _attention_heads=max((node.attributes.get_int("num_heads", 0) for node in nodes), default=0),
    )


def _weights(model: ir.Model) -> Iterator[tuple[ir.Value, WeightSize, str]]:
    """Yield each initializer with what it holds and in which format."""
    counted: set[int] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or id(tensor) in counted:
                continue
            counted.add(id(tensor))
            form, parameters = _format(value, tensor)
            yield value, WeightSize(parameters, stored(tensor).nbytes), form


def _format(value: ir.Value, tensor: ir.TensorProtocol) -> tuple[str, int]:
    """Return the number format of a weight, and how many parameters of the original model it holds."""
    for use in _uses(value):
        node = use.node
        if (value.name or "").endswith((OFFSETS, ".minimum_multipliers", ".minimum_unit")):
            return "block offsets", 0
        if node.op_type in _BLOCKS:
            plane = _PLANE.search(_origin(node.inputs[_BLOCKS[node.op_type][0]]))
            bits = node.attributes.get_int("bits", node.attributes.get_int("expert_weight_bits", 4))
            bits = int(plane[1]) if plane else bits
            form = f"{bits}-bit blocks of {node.attributes.get_int('block_size', 128)}"
            if use.idx not in _BLOCKS[node.op_type] or tensor.dtype != ir.DataType.UINT8 or tensor.size <= 8:
                return form, 0
            if node.op_type == "MatMulNBits" and not plane:
                return form, node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
            return form, tensor.nbytes * 8 // bits
        if node.op_type in _DYNAMIC and tensor.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
            return "int8 dynamic", tensor.size if len(tensor.shape) == 2 else 0
        if node.op_type == "DequantizeLinear":
            form = f"{tensor.dtype.name.lower() if use.idx == 0 else 'integer'} dequantized"
            return (form, tensor.size) if use.idx == 0 else ("scales", 0)
    if tensor.dtype in _NAMES and tensor.size > 1 and not (value.name or "").endswith(ROTARY_TABLES):
        return _NAMES[stored(tensor).dtype], tensor.size
    return "constants", 0


def _origin(value: ir.Value | None) -> str:
    """Return the name of the weight behind a value, through the first inputs of nodes that the runtime folds."""
    while value is not None and (producer := value.producer()) is not None:
        value = producer.inputs[0]
    return "" if value is None else value.name or ""


def _uses(value: ir.Value) -> Iterator[Any]:
    """Yield where a weight is read, also through nodes that the runtime folds."""
    for use in value.uses():
        if _is_folded(use.node):
            yield from _uses(use.node.outputs[0])
        else:
            yield use


def _is_folded(node: ir.Node) -> bool:
    return node.op_type in _FOLDED and all(
        value is not None and (value.is_initializer() or ((made := value.producer()) is not None and _is_folded(made)))
        for value in node.inputs
    )


def _layer_name(value: ir.Value) -> str:
    """Tell where a weight belongs, by its name; by the node that reads it where the name says nothing."""
    names = [value.name or "", *(use.node.name or "" for use in value.uses())]
    for name in names:
        if (index := layer_index(name)) is not None:
            return f"layer {index}"
    operators = {use.node.op_type for use in value.uses()}
    gathered = bool(operators & {"Gather", "GatherBlockQuantized"})
    multiplied = bool(operators & {"MatMul", "Gemm", "Transpose", "MatMulNBits"})
    if any(word in names[0] for word in (*_EMBEDDING, *_HEAD)) or (gathered and len(value.shape or ()) >= 2):
        if gathered and multiplied:
            return "embedding and head"
        return "head" if (multiplied and not gathered) or any(word in names[0] for word in _HEAD) else "embedding"
    return "other"


def _layer_order(name: str) -> tuple[int, int]:
    if name.startswith("layer "):
        return 1, int(name.removeprefix("layer "))
    return (0 if name.startswith("embedding") else 2 if name == "head" else 3), 0


def _port(value: ir.Value) -> Port:
    dimensions = value.shape or ()
    return Port(
        value.name or "",
        value.dtype.name.lower() if value.dtype is not None else "?",
        tuple(d if isinstance(d, int) else str(d.value or "?") for d in dimensions),
    )


__all__ = ["Inspection", "LayerSummary", "MemoryEstimate", "Port", "WeightSize", "inspect_graph"]
