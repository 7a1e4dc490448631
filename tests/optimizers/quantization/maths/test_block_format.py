"""The layout of blocks, against onnxruntime's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxpress.optimizers.quantization.maths.block_format import (
    BlockFormat,
    QuantizedBlocks,
    join_planes,
    multipliers,
    pack,
    split_columns,
    split_planes,
    unpack,
)
from onnxpress.optimizers.quantization.maths.least_squares import round_to_nearest

Run = Callable[..., list[Any]]
KINDS = [(bits, zero_points) for bits in range(2, 9) for zero_points in ("none", "integer")]
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
     {"scale_type": "bfloat16"}],
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
        (BlockFormat(3, 64), 3.5),
        (BlockFormat(2, 16, "float", "int8", 256), 3.125),
        (BlockFormat(6, 16, "none", "int8", 256), 6.5625),
        (BlockFormat(4, 32, "float"), 6),
        (BlockFormat(4, 32, "float", "float16"), 5),
    ],
)
def test_bits_per_weight(format: BlockFormat, expected: float) -> None:
    assert format.bits_per_weight() == expected
    size = sum(operand.nbytes for operand in round_to_nearest(normal(256, 64), format).matmul_nbits())
    assert size * 8 / (256 * 64) == expected


def kernel_operands(blocks: QuantizedBlocks) -> list[np.ndarray]:
    """What is stored, as the nodes that `block_operands` puts before the kernel make it; offsets stay last."""
    format, operands = blocks.format, blocks.matmul_nbits()
    if format.planes:
        count = len(format.planes)
        whole = join_planes(operands[:count], format).reshape(*blocks.scales.shape, -1)
        operands[:count] = [whole]
    operands[1] = operands[1].astype(np.float32) / np.float32(format.shrink)
    return operands


def matmul_nbits(run: Run, blocks: QuantizedBlocks, outputs: int) -> np.ndarray:
    """onnxruntime's MatMulNBits at accuracy level 0, multiplied with the identity: what it takes the weights to be."""
    features, format = blocks.features, blocks.format
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["m", features]))
    tensors = [ir.tensor(operand, name=f"operand{i}") for i, operand in enumerate(kernel_operands(blocks))]
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
    """A product with the identity multiplies by ones and adds zeros."""
    blocks = round_to_nearest(normal(features, outputs), BlockFormat(bits, size, zero_points))
    np.testing.assert_array_equal(matmul_nbits(run, blocks, outputs), blocks.dequantize())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale_type", ["float32", "float16"])
@pytest.mark.parametrize(("features", "outputs", "size"), SHAPES)
def test_offsets_make_up_for_the_kernels_zero_point(
    bits: int, scale_type: Any, features: int, outputs: int, size: int
) -> None:
    format = BlockFormat(bits, size, "float", scale_type)
    blocks = round_to_nearest(normal(features, outputs), format)
    packed, scales, offsets = kernel_operands(blocks)
    codes = unpack(packed, format.field, size) - np.float32(1 << (format.field - 1))
    values = codes * scales[..., None].astype(np.float32) + offsets.T[..., None].astype(np.float32)
    np.testing.assert_allclose(values.reshape(outputs, -1)[:, :features].T, blocks.dequantize(), atol=2e-6)


@pytest.mark.parametrize("scale_type", ["float32", "float16"])
def test_q4_1_is_found_again(scale_type: Any) -> None:
    """w = d · q + m with float16 d and m; both ends of the codes occur, as they do in a Q4_1 block."""
    generator = np.random.default_rng(2)
    q = generator.integers(0, 16, (500, 32))
    q[:, 0], q[:, 1] = 0, 15
    d = generator.uniform(1e-3, 1e-1, (500, 1)).astype(np.float16).astype(np.float32)
    m = (-d * generator.uniform(5, 10, (500, 1))).astype(np.float16).astype(np.float32)
    w = (d * q + m).astype(np.float32)
    packed, scales, offsets = round_to_nearest(w.T, BlockFormat(4, 32, "float", scale_type)).matmul_nbits()
    assert scales.dtype == offsets.dtype == scale_type
    np.testing.assert_array_equal(unpack(packed, 4, 32).reshape(q.shape), q)
    found = (q.astype(np.float64) - 8) * scales + offsets.T
    if scale_type == "float16":
        np.testing.assert_array_equal(found.astype(np.float32), w)
    else:
        np.testing.assert_allclose(found, w, atol=1e-6 * np.abs(w).max())


@pytest.mark.parametrize(("bits", "zero_points"), [kind for kind in KINDS if kind[0] in (4, 8)])
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


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.booleans(), st.sampled_from([0, 32, 64]))
@settings(max_examples=50, deadline=None)
def test_multipliers_of_scales(seed: int, blocks: int, up: bool, unit_size: int) -> None:
    """Half a unit from the scale, a whole one upwards."""
    generator = np.random.default_rng(seed)
    format = BlockFormat(4, 16, "none", "int8", unit_size)
    blocks *= unit_size // 16 or 1
    scales = generator.standard_normal((5, blocks)).astype(np.float32) * generator.choice([0, 0.1, 1, 1e4], (5, 1))
    scales = scales.astype(np.float32)
    levels = multipliers(scales, format, up=up)
    stored, unit = levels.product(), np.broadcast_to(levels.units, levels.multipliers.shape).reshape(5, blocks)
    slack = np.abs(scales) * (unit_size > 0) * 2.0**-11  # a unit in float16 may be so much less than a 127th
    assert (np.abs(stored - scales) <= unit.astype(np.float32) * (1.001 if up else 0.501) + slack).all()
    if up and not unit_size:
        assert (np.abs(stored) >= np.abs(scales) - 2e-3 * unit).all()


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("size", [16, 32])
def test_planes_hold_each_bit_once(bits: int, size: int) -> None:
    """Every code, in the upper bits of its field."""
    format = BlockFormat(bits, size)
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 4, size)).astype(np.uint8)
    packed = pack(codes << (format.field - bits), format.field)
    planes = split_planes(packed, format)
    assert sum(plane.nbytes for plane in planes) * 8 == codes.size * bits
    np.testing.assert_array_equal(join_planes(planes, format).reshape(packed.shape), packed)
