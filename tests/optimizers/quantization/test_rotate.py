"""rotate: the same numbers, gentler activations; and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.graph.anatomy import anatomy_of
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic
from onnxpress.optimizers.quantization.rotate import Rotate

Graph = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]

SIBLINGS = """g (float[B, S, 64] x, float[64, 96] a__weight, float[32, 64] b__weight)
    => (float[B, S, 96] y, float[B, S, 32] z) {
        y = MatMul(x, a__weight)  t = Transpose<perm = [1, 0]>(b__weight)  z = MatMul(x, t) }"""


@pytest.fixture
def siblings(graph: Graph, rng: np.random.Generator) -> ir.Model:
    a, b = rng.standard_normal((64, 96), dtype=np.float32), rng.standard_normal((32, 64), dtype=np.float32)
    return graph(SIBLINGS, a__weight=a, b__weight=b)


def test_golden(check: Callable[..., Any], siblings: ir.Model, rng: np.random.Generator) -> None:
    check(
        Rotate(),
        siblings,
        {"x": rng.standard_normal((2, 5, 64), dtype=np.float32)},
        golden="""
        val_0 = Reshape(x, shape0.0.4.16.rotation)
        val_1 = MatMul(val_0, hadamard16.rotation)
        x.rotation = Reshape(val_1, shape0.0.64.rotation)
        y = MatMul(x.rotation, a.weight)
        t = Transpose[perm=(1, 0)](b.weight)
        z = MatMul(x.rotation, t)
        """,
        tolerance=5e-5,  # 64 products of size 1 in float32, rounded in another order
    )


@pytest.mark.parametrize("size", [2, 16, 64])
def test_rows_of_the_weight_read_in_any_slices(siblings: ir.Model, size: int) -> None:
    before = {name: np.array(siblings.graph.initializers[name].const_value) for name in ("a.weight", "b.weight")}
    Rotate(size)(siblings)
    matrix = np.kron(np.eye(64 // size), np.array(siblings.graph.initializers[f"hadamard{size}.rotation"].const_value))
    for name, expected in (("a.weight", matrix.T @ before["a.weight"]), ("b.weight", before["b.weight"] @ matrix)):
        tensor = siblings.graph.initializers[name].const_value
        np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-5)  # type: ignore[union-attr]
        for start, stop in ((0, 1), (3, 21), (31, 32)):
            np.testing.assert_allclose(tensor.rows(start, stop), expected[start:stop], atol=1e-5)  # type: ignore[union-attr]


def test_int8_loses_less(siblings: ir.Model, run: Run, rng: np.random.Generator) -> None:
    """One loud channel a token, not always the same: nothing constant could smooth it."""
    x = rng.standard_normal((1, 200, 64), dtype=np.float32)
    x[0, np.arange(200), rng.integers(0, 64, 200)] *= 60
    expected = run(siblings, {"x": x})[0]
    rotated = siblings.clone()
    Rotate()(rotated)
    errors = []
    for model in (siblings, rotated):
        QuantizeDynamic("int8", "per_token")(model)
        errors.append(np.square(run(model, {"x": x})[0] - expected).sum())
    assert errors[1] < errors[0] / 3


TEXTS = {
    "no multiple of 16": "g (float[M, 72] x, float[72, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }",
    "small": "g (float[M, 16] x, float[16, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }",
    "weight is shared": """g (float[M, 64] x, float[64, 48] w, int64[N] i) => (float[M, 48] y, float[N, 48] e)
        { y = MatMul(x, w)  e = Gather(w, i) }""",
    "unknown rank": "g (float[M, 64] x, int64[2] s, float[64, 48] w) => (y) { r = Reshape(x, s)  y = MatMul(r, w) }",
}


@pytest.mark.parametrize("reason", TEXTS)
def test_what_is_left_alone(graph: Graph, listing: Callable[[ir.Model], str], reason: str) -> None:
    shape = {"no multiple of 16": (72, 48), "small": (16, 48)}.get(reason, (64, 48))
    model = graph(TEXTS[reason], w=np.ones(shape, np.float32))
    before = listing(model)
    report = Rotate()(model).report  # type: ignore[attr-defined]
    assert not report.matched
    assert any(reason in found for found in report.skipped)
    assert listing(model) == before


@pytest.mark.parametrize("size", [0, 3, 24])
def test_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Rotate(size)


@pytest.mark.parametrize("name", ["llama", "bert", "falcon"])
@pytest.mark.parametrize("then", [None, QuantizeDynamic("uint8", "per_token", min_features=8)])
def test_the_anatomy_stays(exported: Callable[..., ir.Model], name: str, then: QuantizeDynamic | None) -> None:
    model = exported(name, "model")
    before = anatomy_of(model)
    assert Rotate(min_features=8)(model).report.matched  # type: ignore[attr-defined]
    if then is not None:
        then(model)
    after = anatomy_of(model)
    for old, new in zip(before.blocks, after.blocks, strict=True):
        for one, other in zip(old.products, new.products, strict=True):
            assert other.name.startswith(one.name)
        assert [value.name for value in old.hidden] == [value.name for value in new.hidden]
        assert new.attentions[0].output is not None
        assert new.feed_forward is not None
        assert new.feed_forward.down.features == old.feed_forward.down.features  # type: ignore[union-attr]
