"""Block and channel quantization against their derived bounds, and against onnxruntime's own quantizer and kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from onnxpress.optimizers.blocks import BlockFormat, pack, quantize_blocks, quantize_matrix, unpack
from onnxpress.optimizers.channels import dequantize_channels, quantize_channels

Run = Callable[..., list[Any]]
SIZES = st.sampled_from([16, 32, 64])
EPSILON = np.float32(1e-5)
"""Relative room for float32 rounding in w / s · s."""


def weights(block_size: int, rows: int = 6) -> st.SearchStrategy[np.ndarray]:
    """Blocks of any shape of distribution, with zeros, constants and lone outliers among them."""
    return arrays.arrays(
        np.float32,
        (rows, block_size),
        elements=st.floats(-8, 8, width=32, allow_subnormal=False).map(lambda x: np.float32(0 if abs(x) < 1e-6 else x)),
    )


def squared_error(w: np.ndarray, format: BlockFormat) -> np.ndarray:
    return ((quantize_blocks(w, format).dequantize() - w) ** 2).sum(axis=1)


KINDS = [(4, "none"), (4, "integer"), (4, "float"), (8, "none"), (8, "integer")]


@given(st.data(), SIZES, st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_rounding_stays_within_its_bound(data: st.DataObject, size: int, kind: tuple[int, str]) -> None:
    bits, zero_points = kind
    w = data.draw(weights(size))
    blocks = quantize_blocks(w, BlockFormat(bits, size, zero_points, search=False))  # type: ignore[arg-type]
    step = np.abs(blocks.scales)
    bound = step / 2 if zero_points == "float" or (zero_points == "none" and bits == 8) else step
    error = np.abs(blocks.dequantize() - w).max(axis=1)
    assert (error <= bound + EPSILON * np.abs(w).max(axis=1)).all()
    assert blocks.codes.max() < 2**bits


@given(st.data(), SIZES, st.sampled_from(["none", "integer", "float"]))
@settings(max_examples=30, deadline=None)
def test_searching_never_makes_a_block_worse(data: st.DataObject, size: int, zero_points: str) -> None:
    w = data.draw(weights(size))
    searched = squared_error(w, BlockFormat(4, size, zero_points))  # type: ignore[arg-type]
    plain = squared_error(w, BlockFormat(4, size, zero_points, search=False))  # type: ignore[arg-type]
    assert (searched <= plain * (1 + EPSILON) + 1e-12).all()


def test_searching_pays_on_normal_weights() -> None:
    w = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
    assert (
        squared_error(w, BlockFormat(4, 32)).mean() < 0.95 * squared_error(w, BlockFormat(4, 32, search=False)).mean()
    )


@pytest.mark.parametrize(("bits", "low"), [(4, -8), (8, -127)])
def test_symmetric_grids_are_found_again_exactly(bits: int, low: int) -> None:
    """GGUF's Q4_0 and Q8_0: d · q with a float16 d, the weight of largest magnitude being d · low."""
    generator = np.random.default_rng(1)
    q = generator.integers(low, -low, (500, 32))
    q[:, 3] = low
    d = generator.choice([-1, 1], (500, 1)) * generator.uniform(1e-4, 1e-1, (500, 1)).astype(np.float16)
    w = d.astype(np.float32) * q.astype(np.float32)
    np.testing.assert_allclose(quantize_blocks(w, BlockFormat(bits, 32)).dequantize(), w, rtol=3e-7)


def test_q4_1_is_found_again_with_a_fitted_zero_point() -> None:
    """w = d · q + m with float16 d and m; all 16 codes' ends occur, as they do in a Q4_1 block."""
    generator = np.random.default_rng(2)
    q = generator.integers(0, 16, (500, 32))
    q[:, 0], q[:, 1] = 0, 15
    d = generator.uniform(1e-3, 1e-1, (500, 1)).astype(np.float16).astype(np.float32)
    m = (-d * generator.uniform(2, 12, (500, 1))).astype(np.float16).astype(np.float32)
    w = (d * q + m).astype(np.float32)
    blocks = quantize_blocks(w, BlockFormat(4, 32, "float"))
    np.testing.assert_array_equal(blocks.codes, q)
    np.testing.assert_allclose(blocks.dequantize(), w, atol=1e-6 * np.abs(w).max())


def test_zeros_and_constants() -> None:
    w = np.zeros((3, 16), np.float32)
    w[1], w[2] = 0.75, -0.75
    for bits, zero_points in KINDS:
        found = quantize_blocks(w, BlockFormat(bits, 16, zero_points)).dequantize()  # type: ignore[arg-type]
        np.testing.assert_allclose(found, w, atol=1e-6)
        assert (found[0] == 0).all()


@given(st.integers(1, 9), st.integers(1, 33), st.sampled_from([4, 8]))
def test_unpack_inverts_pack(rows: int, count: int, bits: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("options", [{"bits": 5}, {"block_size": 8}, {"block_size": 48}, {"zero_points": "half"}])
def test_formats_that_no_kernel_takes_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        BlockFormat(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "zero_points"), KINDS)
@pytest.mark.parametrize(("features", "outputs", "size"), [(64, 24, 32), (80, 7, 32), (96, 5, 16), (256, 16, 128)])
def test_the_kernel_reads_the_layout(
    run: Run, bits: int, zero_points: str, features: int, outputs: int, size: int
) -> None:
    """onnxruntime's own MatMulNBits at accuracy level 0, multiplied with the identity, gives what we dequantize."""
    w = np.random.default_rng(3).standard_normal((outputs, features)).astype(np.float32)
    format = BlockFormat(bits, size, zero_points)  # type: ignore[arg-type]
    graph_inputs = [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["m", features]))]
    tensors = [ir.tensor(operand, name=f"operand{i}") for i, operand in enumerate(quantize_matrix(w, format))]
    operands = [ir.Value(name=tensor.name, const_value=tensor) for tensor in tensors]
    attributes = {"K": features, "N": outputs, "bits": bits, "block_size": size, "accuracy_level": 0}
    node = ir.node("MatMulNBits", [*graph_inputs, *operands], attributes, domain="com.microsoft")
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["m", outputs])
    node.outputs[0].name = "y"
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph(graph_inputs, node.outputs, nodes=[node], initializers=operands, opset_imports=opsets, name="g")
    (found,) = run(ir.Model(graph, ir_version=10), {"x": np.eye(features, dtype=np.float32)})
    expected = quantize_blocks(np.pad(w, ((0, 0), (0, -features % size))).reshape(-1, size), format).dequantize()
    np.testing.assert_allclose(found.T, expected.reshape(outputs, -1)[:, :features], atol=1e-5)


def test_no_worse_than_onnxruntimes_quantizer() -> None:
    quantizers = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    w = np.random.default_rng(4).standard_normal((128, 96)).astype(np.float32)  # [K, N]
    for symmetric in (True, False):
        config = quantizers.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=4)
        packed, scales, zero_points = quantizers.DefaultWeightOnlyQuantizer(config).qbits_block_quant(w)
        codes = unpack(packed.reshape(96, 4, 16), 4, 32).astype(np.float32)
        zero = np.full((96, 4, 1), 8.0) if symmetric else unpack(zero_points.reshape(96, 2), 4, 4)[..., None]
        theirs = ((codes - zero) * scales.reshape(96, 4, 1)).reshape(96, 128)
        format = BlockFormat(4, 32, "none" if symmetric else "integer")
        ours = quantize_blocks(w.T.reshape(-1, 32), format).dequantize().reshape(96, 128)
        assert ((ours - w.T) ** 2).mean() < ((theirs - w.T) ** 2).mean()


@given(st.data(), st.sampled_from(["int8", "uint8"]), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_channels_stay_within_their_bound(data: st.DataObject, kind: str, rows: int, columns: int) -> None:
    w = data.draw(weights(columns, rows))
    codes, scales, zero_points = quantize_channels(w, kind)  # type: ignore[arg-type]
    assert codes.dtype == zero_points.dtype == kind
    error = np.abs(dequantize_channels(codes, scales, zero_points) - w).max(axis=0)
    bound = scales / 2 if kind == "int8" else scales
    assert (error <= bound + EPSILON * np.abs(w).max(axis=0)).all()
    assert codes.min() >= (-127 if kind == "int8" else 0)


def test_zero_channels_stay_zero() -> None:
    w = np.zeros((8, 2), np.float32)
    w[:, 1] = 1
    for kind in ("int8", "uint8"):
        codes, scales, zero_points = quantize_channels(w, kind)  # type: ignore[arg-type]
        np.testing.assert_array_equal(dequantize_channels(codes, scales, zero_points), w)
