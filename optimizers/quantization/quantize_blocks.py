"""quantize-blocks: weights in blocks of 2 to 8 bits, multiplied by com.microsoft.MatMulNBits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxpress.calibration.known_results import Result
from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_initializers, drop_unused, replace
from onnxpress.graph.linear import Linear, find_linears, selected
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fitting.blockwise import by_input, fit_blockwise, lacks_samples, require_tokens
from onnxpress.optimizers.quantization.block_operands import AnyMethod, DataFree, block_operands
from onnxpress.optimizers.quantization.fit_blocks import CALIBRATED, OPERAND, CalibratedMethod, fit_blocks
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat, ScaleType, ZeroPoints

Method = Literal[DataFree, CalibratedMethod]


class QuantizeBlocks(Pass):
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
        bits: int = 8,
        block_size: int = 64,
        zero_points: ZeroPoints = "none",
        method: Method | None = None,
        accuracy_level: Literal[0, 1, 4] = 4,
        scale_type: ScaleType = "float32",
        unit_size: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, int | str]] | None = None,
        min_features: int = 32,
    ) -> None:
        """
        Args:
            bits: of a weight's code, 2 to 8.
            block_size: inputs that share a scale and a zero point: 16, 32, 64, 128 or 256.
            zero_points: `none`: codes are symmetric about zero; `integer`: a code of its own for zero in each block;
                `float`: an offset in floating point instead.
            method: how codes are found; none: `least-squares` up to 4 bits, `nearest` above, where it gains little.
            accuracy_level: 4 multiplies in integers, 0 and 1 in float32.
            scale_type: how scales and offsets are stored; int8: as whole numbers of a unit.
            unit_size: for scales of type int8: weights that share the unit of their scales; 0: a whole output.
            include: patterns of weight names, such as `*.layers.0.*`; products with others are left alone. None: all.
            exclude: patterns of weight names; products with these are left alone, whatever `include` says.
            overrides: by pattern of weight names, other `bits`, `block_size`, `zero_points`, `scale_type`, `unit_size`;
                the first that fits.
            min_features: products with fewer inputs or outputs are left alone.
        """
        self.accuracy_level = accuracy_level
        self.format = self._checked(BlockFormat(bits, block_size, zero_points, scale_type, unit_size))
        self.method = method
        self.overrides = [(pattern, self._overridden(options)) for pattern, options in (overrides or {}).items()]
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.min_features = min_features

    def _overridden(self, options: Mapping[str, Any]) -> BlockFormat:
        known = {"bits", "block_size", "zero_points", "scale_type", "unit_size"}
        if unknown := set(options) - known:
            raise ValueError(f"overrides may set {', '.join(sorted(known))}, not {unknown.pop()!r}")
        base = {key: getattr(self.format, key) for key in known}
        return self._checked(BlockFormat(**(base | dict(options))))

    def _checked(self, format: BlockFormat) -> BlockFormat:
        if format.field == 8 and self.accuracy_level != 4:
            raise ValueError(
                f"{format.bits}-bit blocks at accuracy_level {self.accuracy_level} expand the weights on every call, "
                "which is slower than float32; use accuracy_level = 4"
            )
        return format

    @property
    def needs_samples(self) -> bool:
        return self.method in CALIBRATED

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
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
            if lacks_samples(self, model, context, report, len(chosen)):
                return
            require_tokens(context.calibration, self.method, "method = least-squares")
            fit_blockwise(
                model,
                context,
                report,
                fit=self.name,
                options=(self.method, sorted((name, repr(format)) for name, format in chosen.items())),
                stages=by_input(linears),
                solve=partial(fit_blocks, formats=chosen, method=self.method),
                put=lambda linear, result: self._put(linear, chosen[linear.name], report, tensors=_operands(result)),
                by_product=True,
            )
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


def _operands(result: Result) -> list[ir.TensorProtocol]:
    return [result[part] for part in sorted(result) if part.startswith(OPERAND)]


def obstacle(linear: Linear, format: BlockFormat) -> str | None:
    """Why a product cannot have this format, if it cannot."""
    if format.unit_size and linear.shape[0] % format.unit_size:
        return "unit_size does not divide the inputs"
    if format.zero_points != "float":
        return None
    if linear.shape[0] % format.block_size:
        return "float zero points need blocks that divide the inputs"
    return None if linear.activation.shape is not None else "float zero points need inputs of known rank"


def quantize_linear(
    linear: Linear,
    format: BlockFormat,
    accuracy_level: int,
    method: AnyMethod | None = None,
    tensors: Sequence[ir.TensorProtocol] | None = None,
) -> None:
    """Put MatMulNBits in place of one product and drop its float weight if nothing else uses it.

    Args:
        tensors: operands that are known already; by default `method` computes them when they are written.
    """
    graph = linear.node.graph
    assert isinstance(graph, ir.Graph)
    features, outputs = linear.shape
    operands = block_operands(
        graph, linear.weight, format, transpose=not linear.transposed, method=method, tensors=tensors
    )
    inputs: list[ir.Value | None] = [linear.activation, operands.codes, operands.scales]
    if operands.zero_points is not None:
        inputs.append(operands.zero_points)
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
    offsets = operands.offsets
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
