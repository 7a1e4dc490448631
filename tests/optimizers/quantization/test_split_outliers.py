"""split-outliers: the same numbers, loud channels apart; int8 holds the others; what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.graph.anatomy.products import find_products
from onnxpress.optimizers.base import Context, PassResult
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic
from onnxpress.optimizers.quantization.split_outliers import SplitOutliers

Graph = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]
LOUD = [7, 40]

SIBLINGS = """g (float[B, S, 64] x, float[64, 96] a__weight, float[32, 64] b__weight)
    => (float[B, S, 96] y, float[B, S, 32] z) {
        y = MatMul(x, a__weight)  t = Transpose<perm = [1, 0]>(b__weight)  z = MatMul(x, t) }"""


@pytest.fixture
def siblings(graph: Graph, rng: np.random.Generator) -> ir.Model:
    a, b = rng.standard_normal((64, 96), dtype=np.float32), rng.standard_normal((32, 64), dtype=np.float32)
    return graph(SIBLINGS, a__weight=a, b__weight=b)


@pytest.fixture
def loud(rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.standard_normal((2, 50, 64), dtype=np.float32)
    x[..., LOUD] *= 300
    return {"x": x}


def calibrated(samples: list[dict[str, np.ndarray]], **options: Any) -> Callable[[ir.Model], PassResult]:
    return partial(SplitOutliers(**options).run, context=Context(Calibration(samples)))


def test_golden(check: Callable[..., Any], siblings: ir.Model, loud: dict[str, np.ndarray]) -> None:
    found = check(
        calibrated([loud], max_error=1e-4),
        siblings,
        loud,
        golden="""
        x.masked.outliers = Mul(x, x.outliers.mask)
        val_0 = Gather[axis=-1](x, x.outliers.channels)
        val_1 = MatMul(x.masked.outliers, a.weight)
        val_2 = MatMul(val_0, a.weight.outliers)
        y = Add(val_1, val_2)
        t = Transpose[perm=(1, 0)](b.weight)
        val_3 = MatMul(x.masked.outliers, t)
        val_4 = MatMul(val_0, b.weight.outliers)
        z = Add(val_3, val_4)
        """,
        tolerance=5e-3,  # of sums of size 1,000, rounded in another order: 64 times 6e-8
    )
    constants = found.model.graph.initializers
    np.testing.assert_array_equal(constants["x.outliers.channels"].const_value, LOUD)
    a, b = (np.array(constants[name].const_value) for name in ("a.weight", "b.weight"))
    assert not a[LOUD].any()
    assert not b[:, LOUD].any()
    before = np.array(siblings.graph.initializers["a.weight"].const_value)
    np.testing.assert_array_equal(constants["a.weight.outliers"].const_value, before[LOUD])
    np.testing.assert_array_equal(constants["a.weight"].const_value.rows(5, 42), a[5:42])


@pytest.mark.parametrize("bias", [False, True])
def test_int8_holds_the_rest(graph: Graph, run: Run, rng: np.random.Generator, bias: bool) -> None:
    """quantize-dynamic takes the masked product and leaves the other; all is found as one product."""
    body = "Gemm(x, w, b)" if bias else "MatMul(x, w)"
    text = f"g (float[M, 64] x, float[64, 48] w, float[48] b) => (float[M, 48] y) {{ y = {body} }}"
    plain = graph(text, w=rng.standard_normal((64, 48), dtype=np.float32), b=rng.standard_normal(48, dtype=np.float32))
    x = rng.standard_normal((80, 64), dtype=np.float32)
    x[:, LOUD] *= 300
    x[:, LOUD] *= rng.random((80, 2)) < 0.05  # in few tokens: the others are what one range spoils
    x[0, LOUD] = 900
    (expected,) = run(plain, {"x": x})
    errors = []
    for split in (False, True):
        model = plain.clone()
        if split:
            calibrated([{"x": x}])(model)
        report = QuantizeDynamic("uint8")(model).report  # type: ignore[attr-defined]
        assert sum(report.matched.values()) == 1
        (product,) = find_products(model.graph)
        assert product.output is model.graph.outputs[0]
        (found,) = run(model, {"x": x})
        errors.append(np.mean(np.square(found - expected).sum(1) / np.square(expected).sum(1)))
    assert errors[1] < errors[0] / 100


def test_left_alone(siblings: ir.Model, loud: dict[str, np.ndarray], listing: Callable[[ir.Model], str]) -> None:
    before = listing(siblings)
    even = {"x": loud["x"].copy()}
    even["x"][..., LOUD] /= 300
    for optimizer, reason in (
        (calibrated([even]), "no outliers"),
        (calibrated([loud], max_channels=1), "outliers in more than 1 channels"),
        (calibrated([loud], exclude=["*"]), "excluded by name"),
        (calibrated([loud], min_features=65), "small"),
        (SplitOutliers(), "no sample inputs for this graph"),
    ):
        report = optimizer(siblings).report  # type: ignore[attr-defined]
        assert report.skipped == {reason: 2}
        assert listing(siblings) == before


def test_a_shared_weight_is_left_alone(graph: Graph, loud: dict[str, np.ndarray]) -> None:
    model = graph(
        """g (float[B, S, 64] x, float[64, 48] w, int64[N] i) => (float[B, S, 48] y, float[N, 48] e)
        { y = MatMul(x, w)  e = Gather(w, i) }""",
        w=np.ones((64, 48), np.float32),
    )
    report = calibrated([loud | {"i": np.array([0])}])(model).report  # type: ignore[attr-defined]
    assert report.skipped == {"weight is shared": 1}


def test_options() -> None:
    for options in ({"max_error": 0}, {"max_channels": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            SplitOutliers(**options)


def test_blocks_after_it(siblings: ir.Model, loud: dict[str, np.ndarray], run: Run) -> None:
    expected = run(siblings, loud)[0]
    calibrated([loud], max_error=1e-4)(siblings)
    QuantizeBlocks(8, 32)(siblings)
    assert [product.name for product in find_products(siblings.graph)] == ["a.weight.q8b32", "b.weight.q8b32"]
    assert np.linalg.norm(run(siblings, loud)[0] - expected) < 1e-3 * np.linalg.norm(expected)
