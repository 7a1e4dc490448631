from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxpress.optimizers.fusion.fuse_gelu import FuseGelu

CONSTANTS = """<float r2 = {1.4142135}, float r = {0.70710677}, float one = {1.0}, float half = {0.5},
    float[1, 1, 1] cube = {1.0}, float three = {3.0},
    float c = {0.044715}, float p = {0.7978846}, float alpha = {1.702}>"""
ERF = [
    "a = Div(x, r2) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, half)",
    "a = Mul(x, r) e = Erf(a) s = Add(one, e) m = Mul(s, half) y = Mul(x, m)",
    "h = Mul(half, x) a = Mul(x, r) e = Erf(a) s = Add(one, e) y = Mul(h, s)",
]
TANH = [
    "k = Pow(x, three) d = Mul(k, c) s = Add(x, d) a = Mul(s, p)"
    " t = Tanh(a) o = Add(t, one) m = Mul(x, half) y = Mul(m, o)",
    "q = Mul(x, x) d = Mul(q, c) s = Add(one, d) f = Mul(x, p) a = Mul(f, s)"
    " t = Tanh(a) o = Add(one, t) m = Mul(half, x) y = Mul(m, o)",
]


def header(opset: int) -> str:
    return f'<ir_version: 10, opset_import: ["": {opset}]>\n'


@pytest.fixture
def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": 3 * rng.standard_normal((5, 7), dtype=np.float32)}


def formula(body: str, output: str = "float[B, 7] y") -> str:
    return f"g (float[B, 7] x) => ({output}) {CONSTANTS} {{ {body} }}"


@pytest.mark.parametrize("body", ERF)
@pytest.mark.parametrize("opset", [18, 21])
def test_erf(graph: Any, check: Any, feeds: Any, body: str, opset: int) -> None:
    done = check(FuseGelu(), graph(formula(body), header=header(opset)), feeds, golden="y = Gelu(x)", tolerance=1e-6)
    assert done.model.graph.node(0).domain == ("" if opset == 21 else "com.microsoft")


@pytest.mark.parametrize("body", TANH)
def test_tanh(graph: Any, check: Any, feeds: Any, body: str) -> None:
    check(FuseGelu(), graph(formula(body)), feeds, golden="y = Gelu[approximate=tanh](x)", tolerance=1e-6)
    check(FuseGelu(), graph(formula(body), header=header(18)), feeds, golden="y = FastGelu(x)", tolerance=1e-6)


def test_quick_gelu_and_silu(graph: Any, check: Any, feeds: Any) -> None:
    quick = graph(formula("a = Mul(x, alpha) s = Sigmoid(a) y = Mul(x, s)"))
    check(FuseGelu(), quick, feeds, golden="y = QuickGelu[alpha=1.702](x)")
    silu = graph(formula("s = Sigmoid(x) y = Mul(s, x)"))
    check(FuseGelu(), silu, feeds, golden="y = QuickGelu[alpha=1](x)")


def test_the_argument_may_itself_be_scaled_and_shifted(graph: Any, check: Any, feeds: Any) -> None:
    body = "z = Mul(x, three) v = Add(z, half) " + ERF[0].replace("x", "v")
    check(FuseGelu(), graph(formula(body)), feeds, golden="z = Mul(x, three)\nv = Add(z, half)\ny = Gelu(v)")


NEAR_MISSES = [
    ERF[0].replace("r2", "three"),  # another scale
    ERF[0].replace("Mul(x, s)", "Mul(a, s)"),  # another factor
    TANH[0].replace("Mul(k, c)", "Mul(k, p)"),  # another polynomial
    "s = Sigmoid(x) y = Mul(s, half)",
]


@pytest.mark.parametrize("body", NEAR_MISSES)
def test_near_misses(graph: Any, listing: Any, body: str) -> None:
    model = graph(formula(body))
    before = listing(model)
    result = FuseGelu()(model)
    assert not result.modified
    assert listing(model) == before
    assert bool(result.report.skipped) == ("Erf" in body)


def test_a_constant_that_adds_a_dimension(graph: Any) -> None:
    body = ERF[0].replace("one)", "cube)")
    assert not FuseGelu()(graph(formula(body, "float[1, B, 7] y"))).modified


def test_a_part_that_is_returned_stays(graph: Any, listing: Any) -> None:
    model = graph(formula(ERF[0], output="float[B, 7] y, float[B, 7] e"))
    before = listing(model)
    assert not FuseGelu()(model).modified
    assert listing(model) == before
