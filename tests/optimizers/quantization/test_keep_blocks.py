"""keep-blocks: weights on a grid keep their values; others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from gguf import GGMLQuantizationType as Type

from onnxpress.graph.io import save_graph
from onnxpress.optimizers.quantization.keep_blocks import GRIDS, ROUNDING, KeepBlocks, grid_of, lies_on
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks

Graph = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]
K_QUANTS = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)
PRODUCT = "g (float[M, 64] x, float[64, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }"


def stored_codes(kind: Type, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A tensor of random bytes, but for the float16 steps: every code, scale and minimum of the format occurs.

    Steps of minima are a few times those of weights, as they are where a minimum is about half a block's range.
    """
    generator = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    halves = {  # the places of d and, where there is one, of dmin
        Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
        Type.IQ4_NL: (0,), Type.IQ4_XS: (0,),
    }[kind]  # fmt: skip
    data = generator.integers(0, 256, (shape[0] * shape[1] // block, size)).astype(np.uint8)
    steps = generator.uniform(1e-4, 1e-2, len(data))
    for place in halves:
        data[:, place : place + 2] = steps.astype(np.float16).view(np.uint8).reshape(-1, 2)
        steps *= generator.uniform(1, 16, len(data))
    return gguf.dequantize(data.reshape(shape[0], -1), kind).astype(np.float32)


def stored(kind: Type, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Random weights [out, in] as llama.cpp's format holds them, in float32 again."""
    weights = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.02)
    if kind in (*K_QUANTS, Type.IQ4_NL, Type.IQ4_XS):
        return stored_codes(kind, shape, seed)
    return gguf.dequantize(gguf.quantize(weights, kind), kind)


@pytest.mark.parametrize(
    "kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q5_0, Type.Q5_1, *K_QUANTS, Type.IQ4_NL, Type.IQ4_XS]
)
def test_ggufs_formats_are_told_apart(kind: Type) -> None:
    weights = stored(kind, (40, 512))
    value = ir.Value(name="w", const_value=ir.tensor(weights))
    assert grid_of(value, transpose=False) == (grid := GRIDS[kind.name])
    turned = ir.Value(name="w", const_value=ir.tensor(np.ascontiguousarray(weights.T)))
    assert grid_of(turned, transpose=True) == grid


def test_an_offset_of_many_bits_stays_in_float32() -> None:
    step, minimum = np.float16(0.0632), np.float16(-0.1742)  # minimum + 8 steps takes 12 bits
    weights = (np.arange(32) % 16 * np.float32(step) + np.float32(minimum))[None].astype(np.float32)
    assert {name for name, grid in GRIDS.items() if grid.format.bits == 4 and lies_on(weights.T, grid)} == {
        "Q4_1 with long offsets"
    }


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q5_0, Type.Q5_1])
def test_the_product_is_that_of_the_stored_weights(graph: Graph, run: Run, kind: Type) -> None:
    """onnxruntime's kernels multiplied with the identity."""
    weights = stored(kind, (48, 64))
    model = graph(PRODUCT, w=np.ascontiguousarray(weights.T))
    integers = kind not in (Type.Q4_0, Type.Q4_1)
    report = KeepBlocks(accuracy_level=4 if integers else 0)(model).report  # type: ignore[attr-defined]
    assert sum(report.matched.values()) == 1
    assert "w" not in model.graph.initializers
    (found,) = run(model, {"x": np.eye(64, dtype=np.float32)})
    # The 8-bit kernel stores an activation of 1 as 127 · (1 / 127), in float32.
    np.testing.assert_allclose(found.T, weights, rtol=2e-5 if integers else 2e-7, atol=ROUNDING * np.abs(weights).max())


@pytest.mark.parametrize("kind", [*K_QUANTS, Type.IQ4_NL, Type.IQ4_XS])
def test_k_quants_multiply_and_are_looked_up(graph: Graph, tmp_path: Path, kind: Type) -> None:
    """As onnxruntime runs the file, its constants folded; fields of 4 bits are multiplied in float32."""
    weights = stored(kind, (48, 512))
    model = graph(
        """g (float[M, 512] x, float[512, 48] w, int64[N] ids, float[48, 512] wte)
        => (float[M, 48] y, float[N, 512] e) { y = MatMul(x, w)  e = Gather(wte, ids) }""",
        w=np.ascontiguousarray(weights.T),
        wte=weights,
    )
    wide = GRIDS[kind.name].format.field == 8
    report = KeepBlocks(accuracy_level=4 if wide else 0)(model).report  # type: ignore[attr-defined]
    assert sum(report.matched.values()) == 2
    save_graph(model, tmp_path / "model.onnx", external_data="model.onnx_data")
    bits = 8 * (tmp_path / "model.onnx_data").stat().st_size / weights.size / 2
    assert bits < GRIDS[kind.name].format.bits_per_weight() + 1  # pages of 4 KiB
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    product, rows = session.run(None, {"x": np.eye(512, dtype=np.float32), "ids": np.arange(48)[::-1].copy()})
    largest = np.abs(weights).max()
    np.testing.assert_allclose(rows, weights[::-1], atol=ROUNDING * largest, rtol=0)
    np.testing.assert_allclose(product.T, weights, atol=(2e-5 if wide else ROUNDING) * largest, rtol=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights: (
            weights * np.random.default_rng(1).uniform(0.9, 1.1, 64).astype(np.float32)
        ),  # as smoothing does
        lambda weights: weights[:, np.random.default_rng(1).permutation(64)],  # other weights in a block
        lambda weights: np.where(np.arange(64) == 7, weights * np.float32(1.01), weights),
    ],
)
def test_weights_that_were_changed_are_left_alone(graph: Graph, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    weights = spoil(stored(Type.Q4_1, (48, 64)))
    model = graph(PRODUCT, w=np.ascontiguousarray(weights.T))
    report = KeepBlocks()(model).report  # type: ignore[attr-defined]
    assert not report.matched
    assert report.skipped == {"on no grid": 1}
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_packed_projections_and_a_tied_embedding(graph: Graph, run: Run) -> None:
    table, query, key = stored(Type.Q8_0, (40, 64)), stored(Type.Q4_1, (32, 64)), stored(Type.Q4_1, (16, 64), 1)
    model = graph(
        """g (int64[M] ids, float[40, 64] wte, float[64, 48] qk) => (float[M, 48] y, float[M, 40] logits)
        <float[M, 64] e> {
        e = Gather(wte, ids)  y = MatMul(e, qk)  t = Transpose<perm = [1, 0]>(wte)  logits = MatMul(e, t) }""",
        wte=table,
        qk=np.ascontiguousarray(np.concatenate([query, key]).T),
    )
    report = KeepBlocks()(model).report  # type: ignore[attr-defined]
    assert report.matched == {
        "GatherBlockQuantized 8 bits, blocks of 32": 1,
        "MatMulNBits sharing the table": 1,
        "4-bit blocks of 32, float zero points": 1,
    }
    assert not QuantizeBlocks()(model).report.matched  # type: ignore[attr-defined]
    assert not KeepBlocks()(model).report.matched  # type: ignore[attr-defined]
    ids = np.arange(40, dtype=np.int64)
    products, logits = run(model, {"ids": ids})
    for found, expected in ((products, table @ np.concatenate([query, key]).T), (logits, table @ table.T)):
        # Activations are rounded to 8 bits by block: on average by a quarter of 1/127 of the largest of 32.
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
