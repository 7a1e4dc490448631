"""The layout of blocks, against onnxruntime's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxpress.optimizers.quantization.block_format import BlockFormat, Blocks, pack, split_columns, unpack
from onnxpress.optimizers.quantization.least_squares import round_to_nearest

Run = Callable[..., list[Any]]
KINDS = [(bits, zero_points) for bits in range(2, 9) for zero_points in ("none", "integer")] + [
    (bits, "float") for bits in (2, 3, 4)
]
SHAPES = [(64, 24, 32), (80, 7, 32), (96, 5, 16), (256, 16, 128), (300, 3, 256)]


def normal(features: int, outputs: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((features, outputs)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 33), st.sampled_from([2, 4, 8]))
def test_unpack_inverts_pack(rows: int, count: int, field: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << field, (rows, count)).astype(np.uint8)
    packed = pack(codes, field)
    assert packed.shape == (rows, -(-count * field // 8))
    np.testing.assert_array_equal(unpack(packed, field, count), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    np.testing.assert_array_equal(pack(np.array([1, 2, 3]), 4), [0x21, 0x03])
    np.testing.assert_array_equal(pack(np.array([1, 2, 3, 0, 1]), 2), [0b00111001, 0b01])


@pytest.mark.parametrize(
    "options",
    [{"bits": 1}, {"bits": 9}, {"block_size": 8}, {"block_size": 48}, {"block_size": 512}, {"zero_points": "half"},
     {"scale_type": "bfloat16"}, {"zero_points": "float", "bits": 8}],
)  # fmt: skip
def test_formats_that_no_kernel_takes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        BlockFormat(**options)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (BlockFormat(4, 32), 5),
        (BlockFormat(4, 32, "integer"), 5.125),
        (BlockFormat(4, 32, "integer", "float16"), 4.625),
        (BlockFormat(3, 64), 4.5),
        (BlockFormat(4, 32, "float"), 6),
    ],
)
def test_bits_per_weight(format: BlockFormat, expected: float) -> None:
    assert format.bits_per_weight() == expected
    operands = round_to_nearest(normal(256, 64), format).matmul_nbits()
    halved = 2 if format.scale_type == "float16" else 1
    size = sum(operand.nbytes // (halved if operand.dtype == np.float32 else 1) for operand in operands)
    assert size * 8 / (256 * 64) == expected


def matmul_nbits(run: Run, blocks: Blocks, outputs: int) -> np.ndarray:
    """onnxruntime's MatMulNBits at accuracy level 0, multiplied with the identity: what it takes the weights to be."""
    features, format = blocks.features, blocks.format
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["m", features]))
    tensors = [ir.tensor(operand, name=f"operand{i}") for i, operand in enumerate(blocks.matmul_nbits())]
    operands = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    attributes = {
        "K": features, "N": outputs, "bits": format.field, "block_size": format.block_size, "accuracy_level": 0
    }  # fmt: skip
    node = ir.node("MatMulNBits", [x, *operands], attributes, domain="com.microsoft")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["m", outputs])
    node.outputs[0].name = "y"
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=operands, opset_imports=opsets, name="g")
    (found,) = run(ir.Model(graph, ir_version=10), {"x": np.eye(features, dtype=np.float32)})
    return np.asarray(found)


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
@pytest.mark.parametrize(("features", "outputs", "size"), SHAPES)
def test_the_kernel_reads_the_layout(
    run: Run, bits: int, zero_points: Any, features: int, outputs: int, size: int
) -> None:
    """A product with the identity multiplies by ones and adds zeros: only float zero points' terms round."""
    blocks = round_to_nearest(normal(features, outputs), BlockFormat(bits, size, zero_points))
    tolerance = 2e-6 if zero_points == "float" else 0
    np.testing.assert_allclose(matmul_nbits(run, blocks, outputs), blocks.dequantize(), atol=tolerance, rtol=0)


@pytest.mark.parametrize(("bits", "zero_points"), [kind for kind in KINDS if kind[1] != "float" and kind[0] in (4, 8)])
@pytest.mark.parametrize(("features", "outputs", "size"), SHAPES)
def test_dequantize_linear_reads_the_layout(
    run: Run, bits: int, zero_points: Any, features: int, outputs: int, size: int
) -> None:
    blocks = round_to_nearest(normal(features, outputs), BlockFormat(bits, size, zero_points))
    codes, *others = blocks.dequantize_linear()
    kinds = {(4, "none"): "INT4", (4, "integer"): "UINT4", (8, "none"): "INT8", (8, "integer"): "UINT8"}
    dtype = ir.DataType[kinds[bits, zero_points]]
    codes, zeros = codes.astype(dtype.numpy()), [array.astype(dtype.numpy()) for array in others[1:]]
    tensors = [ir.tensor(array, name=f"c{i}") for i, array in enumerate([codes, others[0], *zeros])]
    values = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    node = ir.node("DequantizeLinear", values, {"axis": 0, "block_size": size})
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([features, outputs])
    node.outputs[0].name = "y"
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    (found,) = run(ir.Model(graph, ir_version=10), {})
    np.testing.assert_array_equal(found, blocks.dequantize())


def test_dequantize_linear_takes_no_float_zero_points() -> None:
    with pytest.raises(ValueError, match="float zero_points"):
        round_to_nearest(normal(32, 2), BlockFormat(4, 32, "float")).dequantize_linear()


def test_blocks_run_along_the_inputs() -> None:
    weight = np.arange(40 * 2, dtype=np.float32).reshape(40, 2)
    blocks = split_columns(weight, 32)
    assert blocks.shape == (2, 2, 32)
    np.testing.assert_array_equal(blocks[1, 0], weight[:32, 1])
    np.testing.assert_array_equal(blocks[1, 1, :8], weight[32:, 1])
    np.testing.assert_array_equal(blocks[1, 1, 8:], 0)
