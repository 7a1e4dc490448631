"""Operands of MatMulNBits and GatherBlockQuantized for a matrix in blocks, as initializers and nodes of a graph.

The file holds codes, scales and offsets as the format stores them (`block_format`). Nodes at the start of the graph,
which runtimes compute once while they load it, make of them what the kernels take:

    codes     of 3, 5, 6, 7 bits: planes, each shifted and masked, joined in fields of 4 or 8 bits
    scales    of type int8: multipliers · units; smaller in wider fields
    offsets   of type int8: (multipliers · units of the minima + middle · scales)ᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.graph.edits import add_constant, add_initializers
from onnxpress.graph.linear import OFFSETS, read_matrix
from onnxpress.graph.storage import StoredTensor
from onnxpress.graph.tensors import LazyGroup, ViewTensor
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, QuantizedBlocks, mask
from onnxpress.optimizers.quantization.maths.hqq import hqq
from onnxpress.optimizers.quantization.maths.least_squares import fit_least_squares, round_to_nearest
from onnxpress.optimizers.quantization.maths.reencoding import exact_codes

DataFree = Literal["nearest", "least-squares", "hqq"]
AnyMethod = Literal[DataFree, "exact"]
"""`exact`: for weights that are known to be whole multiples of steps, which are found again."""
METHODS: dict[AnyMethod, Callable[[Floats, BlockFormat], QuantizedBlocks]] = {
    "nearest": round_to_nearest,
    "least-squares": fit_least_squares,
    "hqq": hqq,
    "exact": exact_codes,
}


class BlockOperands(NamedTuple):
    """Operands for one matrix [features, outputs]."""

    codes: ir.Value
    """uint8 [outputs, blocks, block_size · field / 8]"""
    scales: ir.Value
    """float32 [outputs, blocks]"""
    zero_points: ir.Value | None
    """uint8 [outputs, ⌈blocks · field / 8⌉]"""
    offsets: ir.Value | None
    """float32 [blocks, outputs], for float zero points"""


def block_operands(
    graph: ir.Graph,
    weight: ir.Value,
    format: BlockFormat,
    *,
    transpose: bool,
    method: AnyMethod | None = None,
    tensors: Sequence[ir.TensorProtocol] | None = None,
) -> BlockOperands:
    """The operands of a matrix; those of an earlier call are reused.

    Args:
        transpose: the weight is stored [in, out], so that blocks run down its columns.
        method: how codes are found; none: `least-squares` up to 4 bits, `nearest` above, where fitting gains little.
        tensors: what `QuantizedBlocks.matmul_nbits` returned, if it is known; by default it is computed when written.
    """
    tensor, name = weight.const_value, weight.name
    assert tensor is not None
    assert name is not None
    shape = [int(size) for size in tensor.shape]  # type: ignore[arg-type]
    outputs, features = reversed(shape) if transpose else shape
    specs = _specs(name, outputs, features, format)
    quantize = METHODS[method or ("least-squares" if format.bits <= 4 else "nearest")]

    def compute() -> list[NDArray[Any]]:
        matrix = read_matrix(tensor, name)
        return quantize(matrix if transpose else matrix.T, format).matmul_nbits()

    if tensors is None:
        tensors = LazyGroup(compute, list(specs.values()), working_bytes=4 * tensor.nbytes).tensors
    # Numbers that the file holds in float16 are float32 to the graph.
    tensors = [StoredTensor(one) if one.dtype == ir.DataType.FLOAT16 else one for one in tensors]
    values = iter(add_initializers(graph, list(specs), tensors))
    start, count = _Start(graph, name), format.block_count(features)
    if format.planes:
        codes = start.codes([next(values) for _ in format.planes], (outputs, count), format)
    else:
        codes = next(values)
    scales = next(values)
    if format.scale_type == "int8":
        scales = start.product(scales, next(values), (outputs, count), "scales")
    zero_points = next(values) if format.zero_points == "integer" else None
    offsets = next(values) if format.zero_points == "float" else None
    if offsets is not None and format.scale_type == "int8":
        minima = start.product(offsets, next(values), (outputs, count), "minima")
        offsets = start.offsets(minima, scales, format)
    return BlockOperands(codes, start.shrunk(scales, format), zero_points, offsets)


def flat_codes(graph: ir.Graph, weight: str, operands: BlockOperands, shape: Sequence[int]) -> ir.Value:
    """The codes as [outputs, bytes of a row], which is how a lookup wants them: other initializers over the same bytes
    where the file holds codes as they are, otherwise a copy that is made when the graph is loaded."""
    codes = operands.codes
    name = f"{codes.name}.rows"
    if codes.const_value is not None:
        return add_initializers(graph, [name], [ViewTensor(codes.const_value, shape)])[0]
    return _Start(graph, weight).reshaped(codes, shape, "codes.rows")


def _specs(name: str, outputs: int, features: int, format: BlockFormat) -> dict[str, tuple[ir.DataType, Sequence[int]]]:
    """The initializers that hold what `QuantizedBlocks.matmul_nbits` returns, by name."""
    count, bytes_ = format.block_count(features), ir.DataType.UINT8
    number = ir.DataType.FLOAT16 if format.scale_type == "float16" else ir.DataType.FLOAT
    base = f"{name}.q{format.bits}b{format.block_size}"
    size = format.block_size * format.field // 8
    specs: dict[str, tuple[ir.DataType, Sequence[int]]] = {}
    for width, position in format.planes:
        specs[f"{base}.plane{position}"] = (bytes_, [outputs, count * size * width // format.field, 1])
    if not format.planes:
        specs[base] = (bytes_, [outputs, count, size])
    parts = features // format.unit_size if format.unit_size else 0
    levels: list[tuple[str, tuple[ir.DataType, Sequence[int]]]] = [
        ("multipliers", (ir.DataType.INT8, [outputs, parts, count // parts] if parts else [outputs, count])),
        ("unit", (ir.DataType.FLOAT16, [outputs, parts, 1]) if parts else (number, [outputs, 1])),
    ]
    if format.scale_type == "int8":
        specs |= {f"{name}.{kind}": spec for kind, spec in levels}
    else:
        specs[f"{name}.scales"] = (number, [outputs, count])
    if format.zero_points == "integer":
        specs[f"{name}.zero_points"] = (bytes_, [outputs, -(-count * format.field // 8)])
    elif format.zero_points == "float" and format.scale_type == "int8":
        specs |= {f"{name}.minimum_{kind}": spec for kind, spec in levels}
    elif format.zero_points == "float":
        specs[f"{name}{OFFSETS}"] = (number, [count, outputs])
    return specs


class _Start:
    """Nodes at the start of a graph that compute something from the numbers of one weight; each is made once."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph, self.name = graph, name
        self.known: dict[str | None, ir.Node] = {
            node.name: node for node in graph if (node.name or "").startswith(f"{name}.")
        }

    def codes(self, planes: Sequence[ir.Value], shape: tuple[int, int], format: BlockFormat) -> ir.Value:
        """Planes -> bytes of the kernel, see `block_format.join_planes`; shape: outputs and blocks."""
        joined: ir.Value | None = None
        whole = (*shape, format.block_size * format.field // 8)
        for plane, (width, position) in zip(planes, format.planes, strict=True):
            label = f"plane{position}"
            shifts = np.arange(format.field // width, dtype=np.uint8) * np.uint8(width)
            parts = self._make("BitShift", f"{label}.shifted", [plane, self._bytes(shifts)], direction="RIGHT")
            parts = self._make("BitwiseAnd", f"{label}.parts", [parts, self._bytes(mask(width, format.field))])
            parts = self._make("Reshape", f"{label}.bytes", [parts, self._shape(whole)])
            if position:
                place = self._bytes(np.uint8(position))
                parts = self._make("BitShift", f"{label}.placed", [parts, place], direction="LEFT")
            joined = parts if joined is None else self._make("BitwiseOr", f"{label}.joined", [joined, parts])
        assert joined is not None
        return _typed(joined, ir.DataType.UINT8, whole)

    def product(self, multipliers: ir.Value, unit: ir.Value, shape: tuple[int, int], label: str) -> ir.Value:
        """multipliers · unit, [outputs, blocks]"""
        wide = self._make("Cast", f"{label}.multipliers", [multipliers], to=ir.DataType.FLOAT)
        split = multipliers.shape is not None and len(multipliers.shape) == 3
        product = self._make("Mul", f"{label}.split" if split else label, [wide, unit])
        if split:
            product = self._make("Reshape", label, [product, self._shape(shape)])
        return _typed(product, ir.DataType.FLOAT, shape)

    def offsets(self, minima: ir.Value, scales: ir.Value, format: BlockFormat) -> ir.Value:
        """(minima + middle · scales)ᵀ, [blocks, outputs]"""
        assert scales.shape is not None
        middle = self._make("Mul", "scales.middle", [scales, self._float(format.middle)])
        total = self._make("Add", "middle", [minima, middle])
        transposed = self._make("Transpose", OFFSETS.removeprefix("."), [total], perm=(1, 0))
        return _typed(transposed, ir.DataType.FLOAT, tuple(reversed(scales.shape)))

    def shrunk(self, scales: ir.Value, format: BlockFormat) -> ir.Value:
        """As small as codes in the upper bits of their field want them."""
        if format.shrink == 1:
            return scales
        assert scales.shape is not None
        small = self._make("Mul", "scales.of_field", [scales, self._float(1 / format.shrink)])
        return _typed(small, ir.DataType.FLOAT, tuple(scales.shape))

    def reshaped(self, codes: ir.Value, shape: Sequence[int], label: str) -> ir.Value:
        return _typed(self._make("Reshape", label, [codes, self._shape(shape)]), ir.DataType.UINT8, shape)

    def _make(self, op_type: str, label: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        name = f"{self.name}.{label}"
        if name not in self.known:
            node = ir.node(op_type, inputs, attributes, name=name)
            node.outputs[0].name = name
            if self.known:  # its inputs were made before it
                self.graph.insert_after(list(self.known.values())[-1], [node])
            else:
                self.graph.insert_before(self.graph[0], [node])
            self.known[name] = node
        return self.known[name].outputs[0]

    def _bytes(self, numbers: Any) -> ir.Value:
        array = np.asarray(numbers, np.uint8)
        return add_constant(self.graph, f"bytes.{'.'.join(map(str, array.reshape(-1)))}", array)

    def _float(self, number: float) -> ir.Value:
        return add_constant(self.graph, f"number.{number:g}", np.float32(number))

    def _shape(self, shape: Sequence[int]) -> ir.Value:
        return add_constant(self.graph, f"shape.{'.'.join(map(str, shape))}", np.array(shape, np.int64))


def _typed(value: ir.Value, dtype: ir.DataType, shape: Sequence[Any]) -> ir.Value:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value
