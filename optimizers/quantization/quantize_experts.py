"""quantize-experts: mixtures of experts in blocks, computed by com.microsoft.QMoE instead of MoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxpress.graph.conventions import MICROSOFT
from onnxpress.graph.edits import add_initializers, drop_unused, replace
from onnxpress.graph.floats import require_finite_weight
from onnxpress.graph.linear import selected
from onnxpress.graph.report import Report
from onnxpress.graph.storage import StoredTensor
from onnxpress.graph.tensors import LazyGroup, concrete_shape, rows_of
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.quantization.block_operands import METHODS, DataFree
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat

PRODUCTS = {2: (2, 3), 4: (5, 6)}
"""Where MoE reads the weights of the two products, and where QMoE reads weights and scales; biases follow both."""
ZERO_POINTS = {2: 11, 4: 12}
ROUTER_WEIGHTS = 14


class QuantizeExperts(Pass):
    """Replace MoE by QMoE, whose weights are [experts, outputs, inputs] in blocks along the inputs.

    Experts are quantized one at a time, when they are written. onnxruntime's kernel normalises the probabilities of the
    chosen experts whatever `normalize_routing_weights` says, unless it is handed them: so where they are not to be
    normalised it gets the softmax of the router's logits.
    """

    name = "quantize-experts"
    exact = False

    def __init__(
        self,
        bits: Literal[2, 4, 8] = 8,
        block_size: int = 32,
        zero_points: Literal["none", "integer"] = "none",
        method: DataFree | None = None,
        accuracy_level: Literal[0, 1, 4] = 4,
        scale_type: Literal["float32", "float16"] = "float32",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        """
        Args:
            bits: width of a code.
            block_size: inputs of an output that share a scale: 16, 32, 64, 128 or 256, with 2 bits from 32; it must
                divide the hidden size and that of an expert.
            zero_points: `none`: symmetric codes; `integer`: a code for each block that stands for 0.
            method: how codes are found: `nearest` rounds; `least-squares` fits scales to the weights; `hqq` fits zero
                points (Half-Quadratic Quantization, Badri and Shaji 2023). None: `least-squares` up to 4 bits,
                `nearest` at 8.
            accuracy_level: at 4 bits 4 multiplies in integers, 0 and 1 in float32; 2 and 8 bits always do the former.
            scale_type: how scales are stored.
            include: patterns of weight names; only mixtures with none but such weights are taken. None: all.
            exclude: patterns of weight names; a mixture with one of these is left alone.
        """
        self.format = BlockFormat(bits, block_size, zero_points, scale_type)
        if self.format.field != bits:
            raise ValueError(f"bits must be 2 (in blocks of 32 or more), 4 or 8, not {bits}")
        self.method: DataFree = method or ("least-squares" if bits <= 4 else "nearest")
        self.accuracy_level = accuracy_level
        self.include, self.exclude = tuple(include), tuple(exclude)

    def apply(self, model: ir.Model, context: Context, report: Report) -> None:
        for node in [node for node in model.graph if node.op_type == "MoE" and node.domain == MICROSOFT]:
            reason = self._obstacle(node)
            if reason is None:
                self._quantize(model.graph, node)
                report.match(f"QMoE {self.format.bits} bits, blocks of {self.format.block_size}")
            else:
                report.skip(reason)

    def _obstacle(self, node: ir.Node) -> str | None:
        if len(node.inputs) > 6 and node.inputs[6] is not None:
            return "experts of three products"
        if node.attributes.get_int("use_sparse_mixer", 0):
            return "sparse mixer"
        for place in PRODUCTS:
            weight = node.inputs[place]
            if weight is None or weight.const_value is None or weight.is_graph_input():
                return "weights of experts are not constant"
            if weight.const_value.dtype != ir.DataType.FLOAT:
                return "weights of experts are not float32"
            if not selected(str(weight.name), self.include, self.exclude):
                return "excluded by name"
            if concrete_shape(weight.const_value)[-1] % self.format.block_size:
                return "blocks do not divide the inputs of experts"
        return None

    def _quantize(self, graph: ir.Graph, node: ir.Node) -> None:
        inputs: list[ir.Value | None] = [*node.inputs[:2], *[None] * ROUTER_WEIGHTS]
        before = []
        for place, (codes, scales) in PRODUCTS.items():
            weight = node.inputs[place]
            assert weight is not None
            operands = self._operands(graph, weight)
            inputs[codes], inputs[scales] = operands[:2]
            inputs[scales + 1] = node.inputs[place + 1] if place + 1 < len(node.inputs) else None
            if len(operands) > 2:
                inputs[ZERO_POINTS[place]] = operands[2]
        if not node.attributes.get_int("normalize_routing_weights", 0):
            before = [ir.node("Softmax", [node.inputs[1]], {"axis": -1})]
            inputs[ROUTER_WEIGHTS] = before[0].outputs[0]
        while inputs[-1] is None:
            inputs.pop()
        format = self.format
        numbers = ir.convenience.convert_attributes(
            {"expert_weight_bits": format.bits, "block_size": format.block_size, "accuracy_level": self.accuracy_level}
        )
        mixture = ir.Node(MICROSOFT, "QMoE", inputs, [*node.attributes.values(), *numbers], name=node.name)
        weights = [node.inputs[place] for place in PRODUCTS]
        replace(node, *before, mixture)
        for weight in weights:
            assert weight is not None
            drop_unused(graph, weight)

    def _operands(self, graph: ir.Graph, weight: ir.Value) -> list[ir.Value]:
        """Codes [experts, outputs, bytes of a row], scales [experts, outputs, blocks], packed zero points likewise."""
        tensor, format, name = weight.const_value, self.format, str(weight.name)
        assert tensor is not None
        experts, outputs, features = concrete_shape(tensor)
        count = features // format.block_size
        number = ir.DataType.FLOAT16 if format.scale_type == "float16" else ir.DataType.FLOAT
        sizes = [features * format.bits // 8, count, -(-count * format.bits // 8)]
        kinds = [ir.DataType.UINT8, number, ir.DataType.UINT8]
        names = [f"{name}.q{format.bits}b{format.block_size}", f"{name}.scales", f"{name}.zero_points"]
        wanted = 3 if format.zero_points == "integer" else 2
        specs = [(kind, [experts, outputs, size]) for kind, size in zip(kinds, sizes, strict=True)][:wanted]

        def compute() -> list[NDArray[Any]]:
            read = rows_of(tensor)
            results = [np.empty(shape, kind.numpy()) for kind, shape in specs]
            for expert in range(experts):
                matrix = require_finite_weight(np.asarray(read(expert, expert + 1)[0], dtype=np.float32), name)
                for result, operand in zip(results, METHODS[self.method](matrix.T, format).matmul_nbits(), strict=True):
                    result[expert] = operand.reshape(outputs, -1)
            return results

        one_expert = 4 * tensor.nbytes // experts
        tensors: Sequence[ir.TensorProtocol] = LazyGroup(compute, specs, working_bytes=one_expert).tensors
        tensors = [StoredTensor(one) if one.dtype == ir.DataType.FLOAT16 else one for one in tensors]
        return add_initializers(graph, names[:wanted], tensors)
