"""quantize-static against onnxruntime's quantize_static on the same ranges, and what both must not do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.arrays import Array
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import BadInputError
from onnxpress.graph.anatomy import find_products
from onnxpress.optimizers.base import Context, PassResult
from onnxpress.optimizers.quantization.activation_ranges import METHODS
from onnxpress.optimizers.quantization.quantize_static import QuantizeStatic

Graph = Callable[..., ir.Model]
Run = Callable[..., list[Array]]

MLP = """g (float[M, 64] x, float[64, 96] a, float[96] c, float[96, 32] d) => (float[M, 32] y) {
    h = Gemm(x, a, c)  r = Relu(h)  y = MatMul(r, d) }"""
ROWS = (
    "g (float[B, S, 64] x, float[64, 96] a__weight, float[64, 32] b__weight) => (float[B, S, 96] y, float[B, S, 32] z)"
)
SIBLINGS = f"{ROWS} {{ y = MatMul(x, a__weight)  z = MatMul(x, b__weight) }}"


def static(sample: dict[str, Array], **options: Any) -> Callable[[ir.Model], PassResult]:
    return partial(QuantizeStatic(**options).run, context=Context(Calibration([sample])))


@pytest.fixture
def mlp(graph: Graph, rng: np.random.Generator) -> ir.Model:
    shapes = {"a": (64, 96), "c": 96, "d": (96, 32)}
    return graph(MLP, **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


@pytest.fixture
def x(rng: np.random.Generator) -> dict[str, Array]:
    return {"x": rng.standard_normal((100, 64), dtype=np.float32)}


def test_golden(mlp: ir.Model, x: dict[str, Array], check: Callable[..., Any]) -> None:
    found = check(
        static(x),
        mlp,
        x,
        golden="""
        x.uint8 = QuantizeLinear(x, x.uint8.scale, x.uint8.zero_point)
        x.uint8.float = DequantizeLinear(x.uint8, x.uint8.scale, x.uint8.zero_point)
        a.uint8.c.float = DequantizeLinear[axis=1](a.uint8.c, a.scales.c, a.zero_points.c)
        c.int32.float = DequantizeLinear[axis=0](c.int32, c.scales)
        h = Gemm(x.uint8.float, a.uint8.c.float, c.int32.float)
        r = Relu(h)
        r.uint8 = QuantizeLinear(r, r.uint8.scale, r.uint8.zero_point)
        r.uint8.float = DequantizeLinear(r.uint8, r.uint8.scale, r.uint8.zero_point)
        d.uint8.float = DequantizeLinear[axis=1](d.uint8, d.scales, d.zero_points)
        y = MatMul(r.uint8.float, d.uint8.float)
        """,
        tolerance=6,
    )
    assert found.result.report.matched == {"uint8 products, uint8 activations": 2}
    # y is of norm √(96 · 64 · 32); 8 bits cost three roundings of 2^-8 each, relative to the range.
    (before,), (after,) = ([np.ravel(o) for o in _run(model, x)] for model in (mlp, found.model))
    assert np.linalg.norm(after - before) < 0.02 * np.linalg.norm(before)


def _run(model: ir.Model, feeds: dict[str, Array], optimized: Path | None = None) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def test_the_runtime_multiplies_in_integers(mlp: ir.Model, x: dict[str, Array], run: Run, tmp_path: Path) -> None:
    static(x)(mlp)
    (fused,) = _run(mlp, x, tmp_path / "fused.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert nodes == ["QuantizeLinear", "QGemm", "MatMulIntegerToFloat"]
    (plain,) = run(mlp, x)
    assert np.abs(fused - plain).max() < 1e-3 * np.abs(plain).max()


class Reader:
    """Onnxruntime's CalibrationDataReader of one sample."""

    def __init__(self, sample: dict[str, Array]) -> None:
        self.left = [sample]

    def get_next(self) -> dict[str, Array] | None:
        return self.left.pop() if self.left else None


def peer(model: ir.Model, sample: dict[str, Array], folder: Path, **options: Any) -> onnx.ModelProto:
    """What onnxruntime's quantize_static makes of a graph, ranges by min-max."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    types = {"uint8": quantization.QuantType.QUInt8, "int8": quantization.QuantType.QInt8}
    outputs = options.pop("outputs")
    onnx.save(ir.to_proto(model), folder / "plain.onnx")
    quantization.quantize_static(
        folder / "plain.onnx",
        folder / "static.onnx",
        Reader(sample),
        activation_type=types[options.pop("activation_type")],
        weight_type=types[weight_type := options.pop("weight_type")],
        per_channel=options.pop("per_channel"),
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={
            "ActivationSymmetric": options.pop("symmetric"),
            "WeightSymmetric": weight_type == "int8",
            "OpTypesToExcludeOutputQuantization": [] if outputs else ["MatMul", "Gemm"],
        },
    )
    return onnx.load(folder / "static.onnx")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("types", "per_channel"),
    [  # uint8 per channel is symmetric in onnxruntime, at a coarser step
        (("uint8", "uint8"), False),
        (("uint8", "int8"), False),
        (("uint8", "int8"), True),
        (("int8", "int8"), True),
    ],
)
@pytest.mark.parametrize("outputs", [False, True])
def test_equal_to_onnxruntimes(
    mlp: ir.Model,
    x: dict[str, Array],
    run: Run,
    tmp_path: Path,
    types: tuple[Any, Any],
    outputs: bool,
    per_channel: bool,
    symmetric: bool,
) -> None:
    """The same codes, up to those that a last bit of a scale puts on the other side of a tie."""
    options: dict[str, Any] = {"activation_type": types[0], "weight_type": types[1]}
    options |= {"outputs": outputs, "per_channel": per_channel, "symmetric": symmetric}
    theirs = peer(mlp, x, tmp_path, **dict(options))
    ours = mlp.clone()
    static(x, ranges="min_max", **options)(ours)
    operators = Counter(node.op_type for node in ours.graph)
    assert operators == Counter(node.op_type for node in theirs.graph.node)
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in theirs.graph.initializer}
    for value in ("x", "r"):
        for part in ("scale", "zero_point"):
            found = ours.graph.initializers[f"{value}.{types[0]}.{part}"].const_value
            np.testing.assert_allclose(found, constants[f"{value}_{part}"], rtol=1e-6)
    weight = "d." + types[1] + ("" if per_channel else "_whole")
    found = np.array(ours.graph.initializers[weight].const_value).astype(int)
    assert (found != constants["d_quantized"]).mean() < 1e-3
    assert np.abs(found - constants["d_quantized"]).max() <= 1
    bias = np.array(ours.graph.initializers["c.int32"].const_value)
    assert np.abs(bias - constants["c_quantized"]).max() <= np.ceil(1e-6 * np.abs(bias).max())
    (expected,), (found,), (exact,) = run(ir.from_proto(theirs), x), run(ours, x), run(mlp, x)
    # A last bit of a scale moves a code across a tie here and there: of the loss, a few percent at most.
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(exact - expected)


def test_a_row_does_not_depend_on_its_batch(graph: Graph, run: Run, rng: np.random.Generator) -> None:
    """Ranges found while running would coarsen all rows by the loudest."""
    weights = {"a__weight": rng.standard_normal((64, 96)), "b__weight": rng.standard_normal((64, 32))}
    model = graph(SIBLINGS, **{name: weight.astype(np.float32) for name, weight in weights.items()})
    x = rng.standard_normal((2, 5, 64), dtype=np.float32)
    static({"x": x})(model)
    assert Counter(node.op_type for node in model.graph) == {
        "QuantizeLinear": 1,
        "DequantizeLinear": 3,
        "MatMul": 2,
    }
    loud = x.copy()
    loud[1] *= 1000
    np.testing.assert_array_equal(run(model, {"x": x})[0][0], run(model, {"x": loud})[0][0])


def test_measured_ranges_cost_least(mlp: ir.Model, rng: np.random.Generator) -> None:
    """No method costs the products less than the one that measuring picks, and clipping pays where a value is loud."""
    x = rng.standard_t(2.5, (400, 64)).astype(np.float32)
    errors: dict[str, dict[str, float]] = {}
    for method in (*METHODS, "measured"):
        report = static({"x": x}, ranges=method, max_error=1.0)(mlp.clone()).report  # type: ignore[attr-defined]
        assert set(report.errors) == {"a", "d"}
        errors[method] = report.errors
    for weight in ("a", "d"):
        assert errors["measured"][weight] == min(errors[method][weight] for method in METHODS)
    assert errors["measured"]["a"] < 0.9 * errors["min_max"]["a"]


def test_products_that_lose_too_much_are_left_alone(mlp: ir.Model, x: dict[str, Array]) -> None:
    errors = static(x, max_error=1.0)(mlp.clone()).report.errors  # type: ignore[attr-defined]
    worse = max(errors, key=lambda name: errors[name])
    limit = float(np.sqrt(np.prod(list(errors.values()))))
    report = static(x, max_error=limit)(mlp).report  # type: ignore[attr-defined]
    assert report.matched == {"uint8 products, uint8 activations": 1}
    assert report.skipped == {f"error above {limit:g}": 1}
    assert worse in mlp.graph.initializers


# fmt: off
NEAR_MISSES = {
    "small": "y = MatMul(x, s)",
    "FusedMatMul has no integer form": "y = com.microsoft.FusedMatMul(x, w)",
    "bias is not constant": "t = ReduceMean<keepdims = 0>(x, n)  y = Gemm(x, w, t)",
    "excluded by name": "y = MatMul(x, w)",
    "": "y = Gemm<alpha = 0.5>(x, w)",
}
# fmt: on


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_what_is_left_alone(graph: Graph, listing: Callable[[ir.Model], str], reason: str) -> None:
    inputs = "float[M, 64] x, float[64, 64] w, float[64, 8] s, int64[1] n"
    model = graph(
        f"g ({inputs}) => (float[M, N] y) <float[64] t> {{ {NEAR_MISSES[reason]} }}",
        w=np.ones((64, 64), np.float32),
        s=np.ones((64, 8), np.float32),
        n=np.array([0]),
    )
    before = listing(model)
    sample = {"x": np.ones((3, 64), np.float32)}
    report = static(sample, exclude=["w"] if reason.startswith("excluded") else [])(model).report  # type: ignore[attr-defined]
    assert not report.matched
    assert listing(model) == before
    assert report.skipped == ({reason: 1} if reason else {})


def test_without_samples_nothing_happens(mlp: ir.Model) -> None:
    assert QuantizeStatic()(mlp).report.skipped == {"no sample inputs for this graph": 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("opset", "activation_type"), [(12, "uint8"), (20, "uint16")])
def test_operator_sets_that_lack_the_codes(graph: Graph, opset: int, activation_type: str) -> None:
    header = f'<ir_version: 8, opset_import: ["": {opset}]>\n'
    text = "g (float[M, 64] x, float[64, 64] w) => (float[M, 64] y) { y = MatMul(x, w) }"
    model = graph(text, header=header, w=np.eye(64, dtype=np.float32))
    report = static({"x": np.ones((3, 64), np.float32)}, activation_type=activation_type)(model).report  # type: ignore[attr-defined]
    assert report.skipped == {f"opset {opset} has no {activation_type} codes": 1}


def test_formats_that_a_target_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="overflow"):
        QuantizeStatic(weight_type="int8", saturates=True)
    with pytest.raises(ValueError, match="no kernel multiplies int8 activations"):
        QuantizeStatic(activation_type="int8", weight_type="uint8")
    with pytest.raises(ValueError, match="no kernels for uint16 activations"):
        QuantizeStatic(activation_type="uint16", kernels=["uint8", "int8"])
    with pytest.raises(ValueError, match="share"):
        QuantizeStatic(share=0)


def test_too_little_text_is_refused(graph: Graph) -> None:
    text = "g (int64[B, S] input_ids, float[100, 64] e, float[64, 64] w) => (float[B, S, 64] y)"
    model = graph(
        f"{text} {{ h = Gather(e, input_ids)  y = MatMul(h, w) }}",
        e=np.ones((100, 64), np.float32),
        w=np.eye(64, dtype=np.float32),
    )
    sample = {"input_ids": np.ones((2, 20), np.int64), "attention_mask": np.ones((2, 20), np.int64)}
    with pytest.raises(BadInputError, match="40 tokens") as caught:
        static(sample)(model)
    assert caught.value.hint is not None


def test_activations_that_are_not_finite_are_refused(mlp: ir.Model, x: dict[str, Array]) -> None:
    huge = np.array(mlp.graph.initializers["a"].const_value) * np.float32(5e37)
    mlp.graph.initializers["a"].const_value = ir.tensor(huge, name="a")
    with pytest.raises(BadInputError, match="r is NaN or infinite in sample 0"):
        static(x)(mlp)


CHAIN = """g (float[B, S, 64] x, float[64, 64] q, float[64, 64] k, float[64] c) => (float[B, S, S] y) {
    Q = MatMul(x, q)  P = Add(Q, c)  K = MatMul(x, k)  T = Transpose<perm = [0, 2, 1]>(K)  y = MatMul(P, T) }"""


def chain(graph: Graph, rng: np.random.Generator) -> tuple[ir.Model, dict[str, Array]]:
    shapes = {"q": (64, 64), "k": (64, 64), "c": 64}
    model = graph(CHAIN, **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    return model, {"x": rng.standard_normal((2, 5, 64), dtype=np.float32)}


def test_other_operators_in_integers(graph: Graph, check: Callable[..., Any], rng: np.random.Generator) -> None:
    """Every operator named sees codes, once each; what it computes is quantized too, output names stay."""
    model, x = chain(graph, rng)
    optimizer = static(x, operators=["MatMul", "Add", "Transpose"], outputs=True, min_features=16)
    found = check(optimizer, model, x, tolerance=60)
    assert found.result.report.matched == {
        "uint8 products, uint8 activations": 2,
        "MatMul": 1,
        "Add": 1,
        "Transpose": 1,
    }
    graph_ = found.model.graph
    quantized = {node.inputs[0].name for node in graph_ if node.op_type == "QuantizeLinear"}
    assert quantized == {"x", "Q", "P", "K", "T", "y.exact"}
    for node in graph_:
        if node.op_type in ("MatMul", "Add", "Transpose"):
            assert {value.producer().op_type for value in node.inputs} == {"DequantizeLinear"}
    (before,), (after,) = _run(model, x), _run(found.model, x)
    assert np.linalg.norm(after - before) < 0.03 * np.linalg.norm(before)


def test_a_value_quantized_twice_keeps_both_grids(graph: Graph, run: Run, rng: np.random.Generator) -> None:
    model = graph(
        SIBLINGS,
        a__weight=rng.standard_normal((64, 96)).astype(np.float32),
        b__weight=rng.standard_normal((64, 32)).astype(np.float32),
    )
    x = {"x": rng.standard_normal((2, 50, 64), dtype=np.float32)}
    expected = run(model, x)
    static({"x": 100 * x["x"]}, include=["a.*"])(model)
    static(x, include=["b.*"])(model)
    coarse, fine = run(model, x)
    assert np.linalg.norm(coarse - expected[0]) > 0.3 * np.linalg.norm(expected[0])
    assert np.linalg.norm(fine - expected[1]) < 0.02 * np.linalg.norm(expected[1])


@given(
    rows=st.integers(1, 9),
    features=st.integers(32, 70),
    outputs=st.integers(32, 70),
    spread=st.floats(-20, 20),
    transposed=st.booleans(),
    kind=st.sampled_from([("uint8", "uint8", True), ("int8", "int8", True), ("uint8", "int8", False)]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_product_is_within_its_rounding(
    graph: Graph, run: Run, rows: int, features: int, outputs: int, spread: float, transposed: bool, kind: Any
) -> None:
    """|y − ŷ| ≤ Σ (s_x |W| + |x| e_w + s_x e_w) + the bias's step, e_w being half a step of W, for uint8 a whole."""
    activation_type, weight_type, per_channel = kind
    rng = np.random.default_rng(features)
    x = (rng.standard_normal((rows, features)) * np.exp(spread)).astype(np.float32)
    w = rng.standard_normal((features, outputs)).astype(np.float32)
    b = (rng.standard_normal(outputs) * np.exp(spread)).astype(np.float32)
    shape = f"{outputs}, {features}" if transposed else f"{features}, {outputs}"
    text = f"g (float[M, {features}] x, float[{shape}] w, float[{outputs}] b) => (float[M, {outputs}] y)"
    model = graph(
        f"{text} {{ y = Gemm<transB = {int(transposed)}>(x, w, b) }}",
        w=np.ascontiguousarray(w.T) if transposed else w,
        b=b,
    )
    optimizer = static(
        {"x": x}, ranges="min_max", activation_type=activation_type, weight_type=weight_type, per_channel=per_channel
    )
    optimizer(model)
    (found,) = run(model, {"x": x})
    constants = {name: np.array(value.const_value, np.float64) for name, value in model.graph.initializers.items()}
    step = constants[f"x.{activation_type}.scale"] / 2
    scales = next(array for name, array in constants.items() if name.startswith("w.") and "scale" in name)
    weight_step = scales * (0.5 if weight_type == "int8" else 1)
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    # A grid that spans the range may put an end of it up to half a step outside: its code is clipped.
    bound = 2 * step * (np.abs(w64) + weight_step).sum(axis=0) + np.abs(x64).sum(axis=1, keepdims=True) * weight_step
    bound = bound + 2 * step * scales + 1e-5 * (np.abs(x64) @ np.abs(w64) + np.abs(b))
    assert (np.abs(found - (x64 @ w64 + b)) <= bound).all()


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_exported_models(name: str, exported: Callable[..., ir.Model], run: Run) -> None:
    """All products of a real export, found again by their activations afterwards."""
    model = exported(name, "model")
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 100, (4, 20))
    sample = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(20), ids.shape).copy(),
    }
    if name == "vit":
        shape = [size if isinstance(size, int) else 2 for size in model.graph.inputs[0].shape or ()]
        sample = {"pixel_values": rng.standard_normal(shape).astype(np.float32)}
    before = [str(product.activation.name) for product in find_products(model.graph)]
    optimizer = static(sample, min_features=16)
    report = optimizer(model).report  # type: ignore[attr-defined]
    assert report.matched
    assert [str(product.activation.name) for product in find_products(model.graph)] == before
