from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.tensors import RowTensor
from onnxpress.optimizers.quantization.float16 import Float16

BLOCK = """g (int64[B, S] ids, float[B, S, 8] past, float[50, 8] embed, float[8, 16] up, float[16, 8] down, float[8] g)
    => (float[B, S, 8] logits, float[B, S, 8] present)
    <float[B, S, 8] e, float[B, S, 8] s, float[B, S, 8] n, float[B, S, 16] u, float[B, S, 16] a> {
    e = Gather(embed, ids)
    s = Add(e, past)
    present = Mul(s, g)
    n = LayerNormalization<axis=-1>(s, g)
    u = MatMul(n, up)
    a = Sigmoid(u)
    logits = MatMul(a, down)
}"""


@pytest.fixture
def model(graph: Any, rng: np.random.Generator) -> ir.Model:
    shapes = {"embed": (50, 8), "up": (8, 16), "down": (16, 8), "g": (8,)}
    return graph(BLOCK, **{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()})


@pytest.fixture
def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"ids": np.array([[1, 2, 3]]), "past": rng.standard_normal((1, 3, 8), dtype=np.float32)}


def test_norms_stay_in_float32(model: ir.Model, feeds: Any, check: Any) -> None:
    done = check(
        Float16(),
        model,
        feeds,
        tolerance=2e-2,
        relative=1e-2,
        golden="""
            e = Gather(embed, ids)
            past.float16 = Cast[to=10](past)
            s = Add(e, past.float16)
            present.float16 = Mul(s, g.float16)
            s.float32 = Cast[to=1](s)
            n = LayerNormalization[axis=-1](s.float32, g)
            n.float16 = Cast[to=10](n)
            u = MatMul(n.float16, up)
            a = Sigmoid(u)
            logits.float16 = MatMul(a, down)
            logits = Cast[to=1](logits.float16)
            present = Cast[to=1](present.float16)
        """,
    )
    weights = {name: value.dtype for name, value in done.model.graph.initializers.items()}
    half, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert weights == {"embed": half, "up": half, "down": half, "g": full, "g.float16": half}


def test_everything_in_float16(model: ir.Model, feeds: Any, run: Any) -> None:
    want = run(model, feeds)
    Float16(keep=(), io="float16")(model)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT16] * 2
    assert "Cast" not in {node.op_type for node in model.graph}
    for got, expected in zip(run(model, {**feeds, "past": feeds["past"].astype(np.float16)}), want, strict=True):
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, expected, atol=3e-2, rtol=2e-2)


def test_as_exact_as_the_converter_of_onnxruntime(model: ir.Model, feeds: Any, run: Any) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    want = run(model, feeds)
    theirs = ir.from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=True, op_block_list=[]))
    Float16(keep=())(model)
    for ours, other, exact in zip(run(model, feeds), run(theirs, feeds), want, strict=True):
        assert np.abs(ours - exact).max() <= 2 * np.abs(other - exact).max() + 1e-3


def test_logits_can_stay_in_float32(model: ir.Model, feeds: Any, check: Any) -> None:
    done = check(Float16(keep=("norms", "logits")), model, feeds, tolerance=2e-2, relative=1e-2)
    assert "logits = MatMul(a.float32, down)" in done.listing


def test_positions_stay_in_float32(graph: Any, check: Any) -> None:
    """4097 is not a float16 number: the angle would be off by a radian."""
    model = graph(
        """g (int64[S] positions, float[4] frequency, float[4] w) => (float[S, 4] y)
        <float[S] p, int64[1] one = {1}, float[S, 1] column, float[S, 4] angle, float[S, 4] c> {
            p = Cast<to=1>(positions)
            column = Unsqueeze(p, one)
            angle = Mul(column, frequency)
            c = Cos(angle)
            y = Mul(c, w)
        }""",
        frequency=np.array([1, 0.1, 0.01, 0.001], np.float32),
        w=np.ones(4, np.float32),
    )
    check(Float16(), model, {"positions": np.array([0, 4097, 9999])}, tolerance=1e-3)


def test_large_weights_are_converted_when_written(graph: Any) -> None:
    def never(start: int, stop: int) -> np.ndarray:
        raise AssertionError("computed")

    weight = RowTensor(never, ir.DataType.FLOAT, (64, 64))
    model = graph("g (float[B, 64] x, float[64, 64] w) => (float[B, 64] y) { y = MatMul(x, w) }", w=weight)
    Float16()(model)
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    with pytest.raises(AssertionError, match="computed"):
        model.graph.initializers["w"].const_value.numpy()


def test_a_weight_that_overflows_is_named(graph: Any) -> None:
    big = np.ones((64, 64), np.float32)
    big[3, 3] = -1e6
    model = graph(
        "g (float[B, 64] x, float[64, 64] layer__w) => (float[B, 64] y) { y = MatMul(x, layer__w) }", layer__w=big
    )
    Float16()(model)
    with pytest.raises(UnsupportedModelError, match=r"layer\.w.*1e\+06"):
        model.graph.initializers["layer.w"].const_value.numpy()


def test_a_masking_constant_becomes_the_lowest_number(graph: Any, check: Any) -> None:
    model = graph(
        """g (bool[S] mask, float[S] x, float[1] low, float[1] w) => (float[S] y) <float[S] m, float[S] s> {
            s = Mul(x, w)
            m = Where(mask, s, low)
            y = Softmax(m)
        }""",
        low=np.array([np.finfo(np.float32).min]),
        w=np.ones(1, np.float32),
    )
    feeds = {"mask": np.array([True, False, True]), "x": np.array([1, 2, 3], np.float32)}
    done = check(Float16(), model, feeds, tolerance=1e-3)
    assert done.model.graph.initializers["low"].const_value.numpy() == -65504


def test_a_graph_without_float32_weights_is_left_alone(graph: Any, check: Any) -> None:
    model = graph("g (float[2] x) => (float[2] y) { y = Exp(x) }")
    done = check(Float16(), model, {"x": np.ones(2, np.float32)}, golden="y = Exp(x)")
    assert done.result.report.skipped == {"no float32 weights to convert": 1}


def test_unknown_options() -> None:
    with pytest.raises(UsageError, match="softmax"):
        Float16(keep=("norm",))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="io"):
        Float16(io="half")  # type: ignore[arg-type]


def test_the_result_is_valid(model: ir.Model) -> None:
    Float16()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
