"""quantize-blocks, quantize-embedding and quantize-dynamic on small graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import CorruptFileError, UnsupportedModelError, UsageError
from onnxpress.graph.io import save_graph
from onnxpress.graph.storage import encode_weights
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat
from onnxpress.optimizers.quantization.maths.least_squares import round_to_nearest
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic
from onnxpress.optimizers.quantization.quantize_embedding import QuantizeEmbedding
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.runtime_profiles import profile

Graph = Callable[..., ir.Model]
Check = Callable[..., Any]
Run = Callable[..., list[np.ndarray]]

SIBLINGS = """g (float[B, S, 64] x, float[64, 96] a__weight, float[64, 32] b__weight)
    => (float[B, S, 96] y, float[B, S, 32] z) { y = MatMul(x, a__weight)  z = MatMul(x, b__weight) }"""
# fmt: off
FORMS = {
    "MatMul": ("y = MatMul(x, w)", False),
    "Transpose": ("t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)", True),
    "Gemm": ("y = Gemm<transB = 1>(x, w, b)", True),
    "FusedMatMul": ("y = com.microsoft.FusedMatMul<transB = 1>(x, w)", True),
}
# fmt: on


@pytest.fixture
def siblings(graph: Graph, rng: np.random.Generator) -> ir.Model:
    return graph(
        SIBLINGS,
        a__weight=rng.standard_normal((64, 96), dtype=np.float32),
        b__weight=rng.standard_normal((64, 32), dtype=np.float32),
    )


@pytest.fixture
def x(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((2, 5, 64), dtype=np.float32)}


def product(graph: Graph, form: str, rng: np.random.Generator) -> ir.Model:
    body, transposed = FORMS[form]
    shape = (48, 64) if transposed else (64, 48)
    text = f"g (float[M, 64] x, float[{shape[0]}, {shape[1]}] w, float[48] b) => (float[M, 48] y) {{ {body} }}"
    weights = {"w": rng.standard_normal(shape, dtype=np.float32), "b": rng.standard_normal(48, dtype=np.float32)}
    return graph(text, **weights)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "optimizer", [QuantizeBlocks(8, 32), QuantizeDynamic("uint8"), QuantizeDynamic("uint8", "per_token")]
)
def test_every_way_to_write_a_product(
    graph: Graph, run: Run, rng: np.random.Generator, form: str, optimizer: QuantizeBlocks | QuantizeDynamic
) -> None:
    model = product(graph, form, rng)
    feeds = {"x": rng.standard_normal((7, 64), dtype=np.float32)}
    (expected,) = run(model, feeds)
    assert sum(optimizer(model).report.matched.values()) == 1  # type: ignore[attr-defined]
    (found,) = run(model, feeds)
    # 8-bit weights and activations: relative rounding errors of about 2^-8 each, averaged over 64 products.
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert "w" not in model.graph.initializers


def test_blocks_golden(check: Check, siblings: ir.Model, x: dict[str, np.ndarray]) -> None:
    found = check(
        QuantizeBlocks(4, 32, "integer", overrides={"b.*": {"bits": 8, "zero_points": "none"}}),
        siblings,
        x,
        golden="""
        y = MatMulNBits[K=64, N=96, accuracy_level=4, bits=4, block_size=32](x, a.weight.q4b32, a.weight.scales, \
a.weight.zero_points)
        z = MatMulNBits[K=64, N=32, accuracy_level=4, bits=8, block_size=32](x, b.weight.q8b32, b.weight.scales)
        """,
        tolerance=5,
    )
    assert found.result.report.matched == {
        "MatMulNBits 4 bits, blocks of 32": 1,
        "MatMulNBits 8 bits, blocks of 32": 1,
    }


def test_float_zero_points_golden(
    check: Check, siblings: ir.Model, x: dict[str, np.ndarray], listing: Callable[[ir.Model], str]
) -> None:
    """Symmetric codes, and offsets times the sums of the inputs by block, which siblings share; the file holds the
    float16 numbers and casts them."""
    found = check(
        QuantizeBlocks(4, 32, "float", accuracy_level=0, scale_type="float16", min_features=2),
        siblings,
        x,
        golden="""
        val_0 = MatMulNBits[K=64, N=96, accuracy_level=0, bits=4, block_size=32](x, a.weight.q4b32, \
a.weight.scales)
        val_1 = Reshape(x, block_shape3.2.32)
        x.block_sums32 = ReduceSum[keepdims=0](val_1, block_axis)
        val_2 = MatMul(x.block_sums32, a.weight.offsets)
        y = Add(val_0, val_2)
        val_3 = MatMulNBits[K=64, N=32, accuracy_level=0, bits=4, block_size=32](x, b.weight.q4b32, \
b.weight.scales)
        val_4 = MatMul(x.block_sums32, b.weight.offsets)
        z = Add(val_3, val_4)
        """,
        tolerance=5,
    )
    encode_weights(found.model)
    halves = [f"{weight}.weight.{part}" for weight in "ab" for part in ("scales", "offsets")]
    casts = [f"{name}/float32 = Cast[to=1]({name})" for name in halves]
    assert listing(found.model).splitlines()[: len(casts)] == casts
    assert {found.model.graph.initializers[name].dtype for name in halves} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize(
    ("bits", "accuracy_level", "scale_type"),
    [(4, 0, "float32"), (4, 0, "float16"), (4, 4, "float32"), (8, 4, "float32")],
)
@pytest.mark.parametrize("form", FORMS)
def test_float_zero_points_multiply_by_what_was_stored(
    graph: Graph, run: Run, rng: np.random.Generator, form: str, bits: Any, accuracy_level: Any, scale_type: Any
) -> None:
    model = product(graph, form, rng)
    weight, bias = (model.graph.initializers[name].const_value.numpy() for name in "wb")  # type: ignore[union-attr]
    identity = np.eye(64, dtype=np.float32)
    stored = round_to_nearest(
        weight.T if FORMS[form][1] else weight, BlockFormat(bits, 32, "float", scale_type)
    ).dequantize()
    # Integer activations: the identity is exact in them, and so is all the rest but float32 rounding.
    QuantizeBlocks(bits, 32, "float", "nearest", accuracy_level, scale_type)(model)
    (found,) = run(model, {"x": identity})
    np.testing.assert_allclose(found, stored + (bias if form == "Gemm" else 0), atol=2e-5)
    assert not any(QuantizeBlocks(8, 16, min_features=1)(model).report.matched)  # type: ignore[attr-defined]


def test_float_zero_points_need_whole_blocks(graph: Graph) -> None:
    model = graph(
        "g (float[M, 80] x, float[80, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }", w=np.ones((80, 48), np.float32)
    )
    report = QuantizeBlocks(4, 32, "float")(model).report  # type: ignore[attr-defined]
    assert report.skipped == {"float zero points need blocks that divide the inputs": 1}


def test_siblings_share_one_quantization(check: Check, siblings: ir.Model, x: dict[str, np.ndarray]) -> None:
    found = check(QuantizeDynamic("uint8"), siblings, x, tolerance=1)
    assert [node.op_type for node in found.model.graph] == ["DynamicQuantizeLinear", *["MatMulIntegerToFloat"] * 2]
    single = check(QuantizeDynamic("uint8", exclude=["b.*"]), siblings, x, tolerance=1)
    assert [node.op_type for node in single.model.graph] == ["DynamicQuantizeMatMul", "MatMul"]


def test_tokens_quantized_alone_or_together_agree(siblings: ir.Model, run: Run, x: dict[str, np.ndarray]) -> None:
    """per_token: an outlier in one token leaves the others as they are, bit for bit; a zero token stays zero."""
    QuantizeDynamic("uint8", "per_token")(siblings)
    loud = x["x"].copy()
    loud[0, 0] *= 1000
    loud[1, 4] = 0
    (alone, *_), (together, *_) = run(siblings, x), run(siblings, {"x": loud})
    np.testing.assert_array_equal(alone[0, 1:], together[0, 1:])
    np.testing.assert_array_equal(together[1, 4], 0)


def test_activations_that_one_range_would_spoil_are_left_alone(siblings: ir.Model, x: dict[str, np.ndarray]) -> None:
    loud = x["x"].copy()
    loud[0, 0] *= 1000
    for sample, left in ((x["x"], 0), (loud, 2)):
        optimizer = QuantizeDynamic("uint8", max_error=1e-3)
        context = Context(Calibration([{"x": sample}]))
        report = optimizer.run(siblings.clone(), context).report
        assert report.skipped.get("error above 0.001", 0) == left
    report = QuantizeDynamic("uint8", max_error=1e-3)(siblings).report  # type: ignore[attr-defined]
    assert not report.matched
    assert report.skipped == {"no sample inputs for this graph": 2}


NEAR_MISSES = {
    "weight is a graph input": "g (float[M, 64] x, float[64, 48] v) => (float[M, 48] y) { y = MatMul(x, v) }",
    "small": "g (float[M, 64] x, float[64, 8] w) => (float[M, 8] y) { y = MatMul(x, w) }",
    "MatMul: weight is not a matrix": (
        "g (float[2, M, 64] x, float[2, 64, 48] w) => (float[2, M, 48] y) { y = MatMul(x, w) }"
    ),
    "excluded by name": "g (float[M, 64] x, float[64, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }",
    "": "g (float[M, 64] x, float[64, 48] w) => (float[M, 48] y) { y = Gemm<alpha = 0.5>(x, w) }",
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
@pytest.mark.parametrize("optimizer", [QuantizeBlocks, QuantizeDynamic])
def test_what_is_left_alone(graph: Graph, listing: Callable[[ir.Model], str], optimizer: Any, reason: str) -> None:
    text = NEAR_MISSES[reason]
    shapes = {"small": (64, 8), "MatMul: weight is not a matrix": (2, 64, 48)}
    weights = {} if "v)" in text else {"w": np.ones(shapes.get(reason, (64, 48)), np.float32)}
    model = graph(text, **weights)
    before = listing(model)
    report = optimizer(**({"exclude": ["w"]} if reason.startswith("excluded") else {}))(model).report
    assert not report.matched
    assert listing(model) == before
    if weights and reason:
        assert report.skipped == {reason: 1}


def test_a_tied_head_shares_the_table(graph: Graph, rng: np.random.Generator, tmp_path: Path) -> None:
    """One table, read by a lookup and by a product: one copy in the file, and both agree with the dequantized table."""
    table = rng.standard_normal((1100, 64), dtype=np.float32)
    model = graph(
        """g (int64[M] ids, float[1100, 64] wte) => (float[M, 64] e, float[M, 1100] logits) {
            e = Gather<axis = 0>(wte, ids)
            t = Transpose<perm = [1, 0]>(wte)
            logits = MatMul(e, t)
        }""",
        wte=table,
    )
    report = QuantizeEmbedding(8, 32)(model).report  # type: ignore[attr-defined]
    assert report.matched == {"GatherBlockQuantized 8 bits, blocks of 32": 1, "MatMulNBits sharing the table": 1}
    assert [node.op_type for node in model.graph] == ["GatherBlockQuantized", "MatMulNBits"]
    save_graph(model, tmp_path / "m.onnx", external_data="m.data")
    assert (tmp_path / "m.data").stat().st_size < 1.2 * table.size  # 1.125 and a page
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    ids = np.array([0, 7, 1099])
    found, logits = session.run(None, {"ids": ids})
    np.testing.assert_allclose(found, table[ids], atol=np.abs(table).max() / 127 / 2 + 1e-6)
    expected = table[ids] @ table.T
    assert np.linalg.norm(logits - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_without_a_head(check: Check, graph: Graph, rng: np.random.Generator, bits: int) -> None:
    table = rng.standard_normal((1100, 64), dtype=np.float32)
    model = graph("g (int64[M] ids, float[1100, 64] wte) => (float[M, 64] e) { e = Gather(wte, ids) }", wte=table)
    optimizer = QuantizeEmbedding(bits, 32, "integer")  # type: ignore[arg-type]
    check(optimizer, model, {"ids": np.array([0, 1, 1099])}, tolerance=0.5 if bits == 4 else 0.03, relative=0)


def test_embedding_refusals(graph: Graph) -> None:
    text = "g (int64[M] ids, float[{0}, {1}] wte) => (float[M, {1}] e) {{ e = Gather(wte, ids) }}"
    report = QuantizeEmbedding(8, 32)(graph(text.format(16, 64), wte=np.ones((16, 64), np.float32))).report  # type: ignore[attr-defined]
    assert report.skipped == {"small table": 1}
    with pytest.raises(UnsupportedModelError, match="do not divide 96") as caught:
        QuantizeEmbedding(8, 64)(graph(text.format(1024, 96), wte=np.ones((1024, 96), np.float32)))
    assert caught.value.hint == "use block_size = 32"


def test_options_that_would_be_slow_or_wrong_are_refused() -> None:
    for optimizer in (QuantizeBlocks, QuantizeEmbedding):
        with pytest.raises(ValueError, match="accuracy_level"):
            optimizer(8, accuracy_level=0)
    with pytest.raises(ValueError, match="accuracy_level"):
        QuantizeBlocks(4, accuracy_level=1, overrides={"*": {"bits": 8}})
    with pytest.raises(ValueError, match="overflow"):
        QuantizeDynamic("int8", saturates=True)


def test_a_weight_that_is_not_finite_is_refused(siblings: ir.Model, tmp_path: Path) -> None:
    siblings.graph.initializers["a.weight"].const_value = ir.tensor(np.full((64, 96), np.nan, np.float32))
    QuantizeBlocks(8, 32)(siblings)
    with pytest.raises(CorruptFileError, match=r"a\.weight"):
        save_graph(siblings, tmp_path / "m.onnx", external_data="m.data")


@pytest.mark.parametrize("name", ["cpu-x86-avx2", "cpu-x86-vnni"])
def test_a_profile_whose_cpu_saturates_refuses_int8(name: str) -> None:
    spec = PassSpec("quantize-dynamic", {"weight_type": "int8"}).resolve(profile.load_profile(name).auto)
    if name == "cpu-x86-vnni":
        spec.build()
        return
    with pytest.raises(UsageError, match="overflow"):
        spec.build()


def test_blocks_that_do_not_divide_are_padded_and_said(graph: Graph, run: Run, rng: np.random.Generator) -> None:
    text = "g (float[M, 72] x, float[72, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }"
    model = graph(text, w=rng.standard_normal((72, 48), dtype=np.float32))
    feeds = {"x": rng.standard_normal((5, 72), dtype=np.float32)}
    (expected,) = run(model, feeds)
    report = QuantizeBlocks(8, 32)(model).report  # type: ignore[attr-defined]
    assert report.matched == {"MatMulNBits 8 bits, blocks of 32": 1, "last block padded": 1}
    assert np.linalg.norm(run(model, feeds)[0] - expected) < 0.02 * np.linalg.norm(expected)
