"""quantize-blocks: weights in 4- or 8-bit blocks, multiplied by com.microsoft.MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.optimizers.base import Report
from onnxpress.optimizers.calibration import NO_SAMPLES, CalibratedPass
from onnxpress.optimizers.fit_blocks import CALIBRATED, CalibratedMethod, Fitted, fit_blocks
from onnxpress.optimizers.linear import (
    MICROSOFT,
    OFFSETS,
    Linear,
    add_initializers,
    drop_unused,
    find_linears,
    read_matrix,
    replace,
    selected,
)
from onnxpress.optimizers.quantization.block_format import BlockFormat, Blocks, Floats, ScaleType, ZeroPoints
from onnxpress.optimizers.quantization.hqq import hqq
from onnxpress.optimizers.quantization.least_squares import fit_least_squares, round_to_nearest
from onnxpress.storage import StoredTensor
from onnxpress.tensors import LazyGroup

DataFree = Literal["nearest", "least-squares", "hqq"]
Method = Literal[DataFree, CalibratedMethod]
METHODS: dict[DataFree, Callable[[Floats, BlockFormat], Blocks]] = {
    "nearest": round_to_nearest,
    "least-squares": fit_least_squares,
    "hqq": hqq,
}


class QuantizeBlocks(CalibratedPass):
    """Replace products with a constant matrix by MatMulNBits, whose kernel also quantizes activations block by block.

    The last block of a row that `block_size` does not divide is padded, which the report says. Weights are quantized
    when they are written, unless the method looks at activations.

    nearest          round to nearest, on grids that reach the largest weights
    least-squares    grids with the least squared error of the weights
    hqq              grids that let outliers go
    importance       least squares, every input channel weighted by how loud it is on sample inputs
    gptq             rounding that makes up for the errors already made, on sample inputs
    """

    name = "quantize-blocks"
    exact = False
    wanted_rows = 32
    wanted_length = 256

    def __init__(
        self,
        bits: Literal[2, 4, 8] = 8,
        block_size: int = 64,
        zero_points: ZeroPoints = "none",
        method: Method | None = None,
        accuracy_level: Literal[0, 1, 4] = 4,
        scale_type: ScaleType = "float32",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, int | str]] | None = None,
        min_features: int = 32,
    ) -> None:
        """
        Args:
            bits, block_size, zero_points, scale_type: see `onnxpress.optimizers.quantization.block_format`.
            method: how codes are found; none: `least-squares` up to 4 bits, `nearest` at 8, where fitting gains little.
            accuracy_level: 4 multiplies in integers, 0 and 1 in float32.
            include, exclude: patterns of weight names; products with other weights are left alone.
            overrides: by pattern of weight names, other `bits`, `block_size`, `zero_points` or `scale_type`; the first
                that fits.
            min_features: products with fewer inputs or outputs are left alone.
        """
        if accuracy_level != 4 and 8 in (bits, *(override.get("bits") for override in (overrides or {}).values())):
            raise ValueError(
                f"8-bit blocks at accuracy_level {accuracy_level} expand the weights on every call, "
                "which is slower than float32; use accuracy_level = 4"
            )
        self.format = self._checked(BlockFormat(bits, block_size, zero_points, scale_type))
        self.method = method
        self.overrides = [(pattern, self._overridden(options)) for pattern, options in (overrides or {}).items()]
        self.fitted: dict[str, Fitted] = {}
        self.accuracy_level = accuracy_level
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_features = min_features

    def _overridden(self, options: Mapping[str, Any]) -> BlockFormat:
        known = {"bits", "block_size", "zero_points", "scale_type"}
        if unknown := set(options) - known:
            raise ValueError(f"overrides may set {', '.join(sorted(known))}, not {unknown.pop()!r}")
        base = {key: getattr(self.format, key) for key in known}
        return self._checked(BlockFormat(**(base | dict(options))))

    @staticmethod
    def _checked(format: BlockFormat) -> BlockFormat:
        if format.bits != format.field:
            raise ValueError(f"bits must be 2, 4 or 8, not {format.bits}: the kernel stores them in {format.field}")
        return format

    @property
    def needs_samples(self) -> bool:
        return self.method in CALIBRATED

    def apply(self, model: ir.Model, report: Report) -> None:
        chosen: dict[str, BlockFormat] = {}
        linears: list[Linear] = []
        for linear in list(find_linears(model.graph, report)):
            format = self.format_of(linear.name)
            if not selected(linear.name, self.include, self.exclude):
                report.skip("excluded by name")
            elif min(linear.shape) < self.min_features:
                report.skip("small")
            elif reason := obstacle(linear, format):
                report.skip(reason)
            else:
                chosen[linear.name] = format
                linears.append(linear)
        if self.method == "gptq" or self.method == "importance":
            if not self.calibration.fits(model):
                report.skip(NO_SAMPLES, len(chosen))
                return
            for linear, tensors in fit_blocks(model, chosen, self.method, self.calibration, report, self.fitted):
                self._put(linear, chosen[linear.name], report, tensors=tensors)
        else:
            for linear in linears:
                self._put(linear, chosen[linear.name], report, method=self.method)
        if report.matched:
            model.opset_imports.setdefault(MICROSOFT, 1)

    def _put(self, linear: Linear, format: BlockFormat, report: Report, **operands: Any) -> None:
        quantize_linear(linear, format, self.accuracy_level, **operands)
        report.match(f"MatMulNBits {format.bits} bits, blocks of {format.block_size}")
        if linear.shape[0] % format.block_size:
            report.match("last block padded")

    def format_of(self, name: str) -> BlockFormat:
        """The format that the options give to the weight called `name`."""
        return next((format for pattern, format in self.overrides if selected(name, (pattern,), ())), self.format)


def obstacle(linear: Linear, format: BlockFormat) -> str | None:
    """Why a product cannot have this format, if it cannot."""
    if format.zero_points != "float":
        return None
    if linear.shape[0] % format.block_size:
        return "float zero points need blocks that divide the inputs"
    return None if linear.activation.shape is not None else "float zero points need inputs of known rank"


def quantize_linear(
    linear: Linear,
    format: BlockFormat,
    accuracy_level: int,
    method: DataFree | None = None,
    tensors: Sequence[ir.TensorProtocol] | None = None,
) -> None:
    """Put MatMulNBits in place of one product and drop its float weight if nothing else uses it.

    Args:
        tensors: operands that are known already; by default `method` computes them when they are written.
    """
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    features, outputs = linear.shape
    operands = block_initializers(
        graph, linear.weight, format, transpose=not linear.transposed, method=method, tensors=tensors
    )
    offsets = operands.pop() if format.zero_points == "float" else None
    inputs: list[ir.Value | None] = [linear.activation, *operands]
    if linear.bias is not None:
        inputs += [None] * (5 - len(inputs)) + [linear.bias]
    product = ir.node(
        "MatMulNBits",
        inputs,
        attributes={
            "K": features,
            "N": outputs,
            "bits": format.field,
            "block_size": format.block_size,
            "accuracy_level": accuracy_level,
        },
        domain=MICROSOFT,
        name=linear.node.name,
    )
    after = [] if offsets is None else _add_offsets(graph, linear, product, offsets, format.block_size)
    replace(linear.node, product, *after)
    drop_unused(graph, linear.weight)


def _add_offsets(
    graph: ir.Graph, linear: Linear, product: ir.Node, offsets: ir.Value, block_size: int
) -> list[ir.Node]:
    """y + (sums of the inputs by block) · offsets; products of one activation share its sums."""
    activation = linear.activation
    assert activation.shape is not None
    name = f"{activation.name}.block_sums{block_size}"
    sums = next((v for node in activation.consumers() for v in _block_sums(node) if v.name == name), None)
    nodes = []
    if sums is None:
        count = linear.shape[0] // block_size
        split = ir.tensor(np.array([0] * (len(activation.shape) - 1) + [count, block_size], np.int64))
        last = ir.tensor(np.array([-1], np.int64))
        shape, axes = add_initializers(
            graph, [f"block_shape{len(activation.shape)}.{count}.{block_size}", "block_axis"], [split, last]
        )
        blocks = ir.node("Reshape", [activation, shape], name=f"{name}.split")
        sums_node = ir.node("ReduceSum", [blocks.outputs[0], axes], {"keepdims": 0}, name=name)
        sums = sums_node.outputs[0]
        sums.name, sums.type = name, ir.TensorType(ir.DataType.FLOAT)
        sums.shape = ir.Shape([*activation.shape[:-1], count])
        nodes = [blocks, sums_node]
    correction = ir.node("MatMul", [sums, offsets], name=f"{linear.node.name}.offsets" if linear.node.name else None)
    return [*nodes, correction, ir.node("Add", [product.outputs[0], correction.outputs[0]])]


def _block_sums(reshape: ir.Node) -> Sequence[ir.Value]:
    return [node.outputs[0] for node in reshape.outputs[0].consumers() if node.op_type == "ReduceSum"]


def block_initializers(
    graph: ir.Graph,
    weight: ir.Value,
    format: BlockFormat,
    *,
    transpose: bool,
    method: DataFree | None = None,
    tensors: Sequence[ir.TensorProtocol] | None = None,
) -> list[ir.Value]:
    """Codes, scales and zero points or offsets of a matrix as initializers; those of an earlier call are reused.

    Args:
        transpose: the weight is stored [in, out], so that blocks run down its columns.
        tensors: what they hold, if it is known; by default `method` computes it when they are written.
    """
    tensor, name = weight.const_value, weight.name
    assert tensor is not None
    assert name is not None
    shape = [int(size) for size in tensor.shape]  # type: ignore[arg-type]
    outputs, features = reversed(shape) if transpose else shape
    count = format.block_count(features)
    number = ir.DataType.FLOAT16 if format.scale_type == "float16" else ir.DataType.FLOAT
    bytes_ = ir.DataType.UINT8
    specs: dict[str, tuple[ir.DataType, list[int]]] = {
        f"{name}.q{format.bits}b{format.block_size}": (bytes_, [outputs, count, format.block_size * format.field // 8])
    }
    if format.scale_type == "int8":
        specs[f"{name}.multipliers"] = (ir.DataType.INT8, [outputs, count])
        specs[f"{name}.unit"] = (number, [outputs, 1])
    else:
        specs[f"{name}.scales"] = (number, [outputs, count])
    if format.zero_points == "integer":
        specs[f"{name}.zero_points"] = (bytes_, [outputs, -(-count * format.field // 8)])
    elif format.zero_points == "float":
        specs[f"{name}{OFFSETS}"] = (number, [count, outputs])
    quantize = METHODS[method or ("least-squares" if format.field < 8 else "nearest")]

    def compute() -> list[NDArray[Any]]:
        matrix = read_matrix(tensor, name)
        return quantize(matrix if transpose else matrix.T, format).matmul_nbits()

    if tensors is None:
        tensors = LazyGroup(compute, list(specs.values()), working_bytes=4 * tensor.nbytes).tensors
    # Numbers that the file holds in float16 are float32 to the graph.
    tensors = [StoredTensor(one) if one.dtype == ir.DataType.FLOAT16 else one for one in tensors]
    values = add_initializers(graph, list(specs), tensors)
    if format.scale_type == "int8":
        values[1:3] = [_scales(graph, values[1], values[2], f"{name}.scales")]
    return values


def _scales(graph: ir.Graph, multipliers: ir.Value, unit: ir.Value, name: str) -> ir.Value:
    """multipliers · unit, [out, blocks] float32, by nodes at the start of the graph; those of an earlier call again."""
    for node, _ in unit.uses():
        return node.outputs[0]
    cast = ir.node("Cast", [multipliers], {"to": ir.DataType.FLOAT})
    product = ir.node("Mul", [cast.outputs[0], unit])
    graph.insert_before(graph[0], [cast, product])
    scales = product.outputs[0]
    scales.name, scales.type, scales.shape = name, ir.TensorType(ir.DataType.FLOAT), multipliers.shape
    return scales
