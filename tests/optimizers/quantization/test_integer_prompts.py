"""integer-prompts against numpy, and the branch for few tokens against the graph without it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.arrays import Feeds
from onnxpress.optimizers.quantization.integer_prompts import IntegerPrompts
from onnxpress.optimizers.quantization.maths.block_format import unpack
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks

Graph = Callable[..., ir.Model]

PRODUCT = """g (int64[B, S] input_ids, float[B, S, 96] x, float[96, 48] w__weight) => (float[B, S, 48] y)
    { y = MatMul(x, w__weight) }"""
GEMM = """g (int64[S] input_ids, float[S, 64] x, float[32, 64] w__weight, float[32] b) => (float[S, 32] y)
    { y = Gemm<transB = 1>(x, w__weight, b) }"""
MLP = """g (int64[B, S] input_ids, float[B, S, 64] x, float[64, 96] gate, float[64, 96] up, float[96, 64] down)
    => (float[B, S, 64] y) {
    g = MatMul(x, gate)  s = Sigmoid(g)  a = Mul(g, s)  u = MatMul(x, up)  h = Mul(a, u)  d = MatMul(h, down)
    y = Add(x, d) }"""


def run(model: ir.Model, feeds: Feeds) -> np.ndarray:
    """With the runtime's optimizations: it reads scales that are not constant wrongly at accuracy level 4."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    result: np.ndarray = session.run(None, dict(feeds))[0]
    return result


def feeds(rng: np.random.Generator, *shape: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.zeros(shape[:-1], np.int64),
        "x": rng.standard_normal(shape, dtype=np.float32),
    }


def quantized(
    graph: Graph, text: str, rng: np.random.Generator, zero_points: str, **shapes: tuple[int, ...]
) -> ir.Model:
    weights = {name: rng.standard_normal(shape, dtype=np.float32) + 0.3 for name, shape in shapes.items()}
    model = graph(text, **weights)
    QuantizeBlocks(bits=4, block_size=32, zero_points=zero_points, scale_type="int8")(model)  # type: ignore[arg-type]
    return model


def expected(model: ir.Model, x: np.ndarray, zero_points: str) -> np.ndarray:
    """x · w as the docstring of the pass has it, for the weight called w.weight."""
    arrays = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    codes, multipliers = arrays["w.weight.q4b32"], arrays["w.weight.multipliers"].astype(np.float64)
    centres = np.full(multipliers.shape, 8)
    if zero_points == "integer":
        centres = unpack(arrays["w.weight.zero_points"], 4, centres.shape[1]).astype(int)
    reach = 15 if zero_points == "integer" else 8
    centred = unpack(codes, 4, 32).astype(int) - centres[:, :, None]
    bytes_ = np.rint(centred * multipliers[:, :, None] / reach).reshape(len(codes), -1)
    weight = bytes_ * reach * arrays["w.weight.unit"]
    largest = np.abs(x).max(axis=-1, keepdims=True)
    rows: np.ndarray = np.rint(x / largest * 127) / 127 * largest
    return rows @ weight.T


@pytest.mark.parametrize("zero_points", ["none", "integer"])
def test_integer_products_are_those_of_numpy(graph: Graph, rng: np.random.Generator, zero_points: str) -> None:
    model = quantized(graph, PRODUCT, rng, zero_points, w__weight=(96, 48))  # 3 blocks: zero points end in half a byte
    inputs = feeds(rng, 2, 5, 96)
    result = IntegerPrompts(min_tokens=10, min_weights=0)(model)
    assert dict(result.report.matched) == {"integer products from 10 tokens on": 1}  # type: ignore[attr-defined]
    # Everything is a whole number but for the scales: float32 rounding remains, and a row's x / max may round apart.
    np.testing.assert_allclose(run(model, inputs), expected(model, inputs["x"], zero_points), atol=2e-2, rtol=1e-5)


def test_bias(graph: Graph, rng: np.random.Generator) -> None:
    model = quantized(graph, GEMM, rng, "none", w__weight=(32, 64), b=(32,))
    bias = model.graph.initializers["b"].const_value
    assert bias is not None
    inputs = feeds(rng, 12, 64)
    IntegerPrompts(min_tokens=12, min_weights=0)(model)
    wanted = expected(model, inputs["x"], "none") + bias.numpy()
    np.testing.assert_allclose(run(model, inputs), wanted, atol=2e-2, rtol=1e-5)


@pytest.mark.parametrize("zero_points", ["none", "integer"])
def test_few_tokens_take_the_same_way_as_before(graph: Graph, rng: np.random.Generator, zero_points: str) -> None:
    model = quantized(graph, MLP, rng, zero_points, gate=(64, 96), up=(64, 96), down=(96, 64))
    few, many = feeds(rng, 1, 3, 64), feeds(rng, 2, 2, 64)
    before, before_many = run(model, few), run(model, many)
    IntegerPrompts(min_tokens=4, min_weights=0)(model)
    np.testing.assert_array_equal(run(model, few), before)
    after = run(model, many)
    assert not np.array_equal(after, before_many)
    # Both are the same weights; activations have 8 bits in both, a range per row instead of one per block.
    assert np.abs(after - before_many).std() < 0.03 * before_many.std()


def test_an_mlp_shares_one_if(graph: Graph, rng: np.random.Generator) -> None:
    model = quantized(graph, MLP, rng, "integer", gate=(64, 96), up=(64, 96), down=(96, 64))
    IntegerPrompts(min_tokens=4, min_weights=0)(model)
    assert [node.op_type for node in model.graph if node.op_type in ("If", "Add", "MatMulNBits")] == ["If", "Add"]
    branch = next(node for node in model.graph if node.op_type == "If")
    blocks = branch.attributes["else_branch"].as_graph()
    assert [node.op_type for node in blocks] == ["MatMulNBits", "Sigmoid", "Mul", "MatMulNBits", "Mul", "MatMulNBits"]
    integers = [node.op_type for node in branch.attributes["then_branch"].as_graph()]
    assert integers.count("MatMulIntegerToFloat") == 3
    assert integers.count("ReduceMax") == 2  # x once for gate and up
    names = [v.name for g in model.graphs() for node in g for v in node.outputs]
    assert len(names) == len(set(names))
    assert not IntegerPrompts(min_tokens=4, min_weights=0)(model).report.matched  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_tokens": 0, "min_weights": 0}, "min_tokens is 0"),
        ({"min_weights": 48 * 96 + 1}, "too few weights for an If"),
        ({"min_weights": 0, "tokens": "decoder_input_ids"}, "no input decoder_input_ids"),
    ],
)
def test_left_alone(graph: Graph, rng: np.random.Generator, options: dict[str, int], reason: str) -> None:
    model = quantized(graph, PRODUCT, rng, "none", w__weight=(96, 48))
    result = IntegerPrompts(**options)(model)  # type: ignore[arg-type]
    assert dict(result.report.skipped) == {reason: 1}  # type: ignore[attr-defined]
    assert not result.modified


def test_other_formats_are_left_alone(graph: Graph, rng: np.random.Generator) -> None:
    text = PRODUCT.replace("w__weight", "w")
    for options, reason in (
        ({"bits": 4, "block_size": 32}, 'scales are not of the type "int8"'),
        ({"bits": 8, "block_size": 32, "scale_type": "int8"}, "not in 4-bit blocks"),
        ({"bits": 4, "block_size": 64, "scale_type": "int8"}, "last block padded"),
    ):
        model = graph(text, w=rng.standard_normal((96, 48), dtype=np.float32))
        QuantizeBlocks(**options)(model)  # type: ignore[arg-type]
        result = IntegerPrompts(min_weights=0)(model)
        assert dict(result.report.skipped) == {reason: 1}  # type: ignore[attr-defined]


def test_a_cpu_that_saturates_is_refused() -> None:
    with pytest.raises(ValueError, match="overflow"):
        IntegerPrompts(min_tokens=128, saturates=True)
    IntegerPrompts(min_tokens=0, saturates=True)
