from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.optimizers.fusion.clean_up import CleanUp


def test_everything_that_changes_nothing_goes(graph: Any, check: Any, rng: np.random.Generator) -> None:
    w = rng.standard_normal(4, dtype=np.float32)
    model = graph(
        """g (float[B, 4] x, float[4] w, float[4] v, float[4] unused) => (float[B, 4] y) {
            copy = Identity(x)
            one = Constant<value_float=1.0>()
            two = Constant<value_float=2.0>()
            three = Add(one, two)
            a = Mul(copy, w)
            b = Mul(x, v)
            dead = Exp(a)
            s = Add(a, b)
            y = Mul(s, three)
        }""",
        w=w,
        v=w.copy(),
        unused=w,
    )
    done = check(
        CleanUp(),
        model,
        {"x": rng.standard_normal((2, 4), dtype=np.float32)},
        golden="""
            a = Mul(x, w)
            s = Add(a, a)
            y = Mul(s, three)
        """,
    )
    assert set(done.model.graph.initializers) == {"w", "three"}
    assert set(done.result.report.matched) >= {"identities", "dead code", "common subexpressions"}


def lazy(name: str, *shape: int) -> ir.LazyTensor:
    """A large weight that must not be computed."""
    return ir.LazyTensor(lambda: pytest.fail(f"{name} was computed"), ir.DataType.FLOAT, ir.Shape(shape), name=name)


def test_large_weights_are_never_computed(graph: Any, listing: Any) -> None:
    shared = lazy("shared", 64, 64)
    model = graph(
        """g (float[B, 64] x, float[64, 64] a, float[64, 64] b, float[64, 64] c, float[64, 64] d) => (float[B, 64] y) {
            p = MatMul(x, a)
            q = MatMul(p, b)
            t = Transpose<perm=[1, 0]>(c)
            r = MatMul(q, t)
            h = Transpose<perm=[1, 0]>(d)
            u = MatMul(r, h)
            y = MatMul(u, d)
        }""",
        a=shared,
        b=shared,
        c=lazy("c", 64, 64),
        d=lazy("d", 64, 64),
    )
    report = CleanUp()(model).report
    assert report.skipped == {"transposed weight is read elsewhere too": 1}
    assert report.matched == {"duplicate weights": 1, "transposed weights": 1}
    assert "MatMul(p, a)" in listing(model)
    assert "MatMul(q, c)" in listing(model)


def test_transposed_weights_keep_their_name(graph: Any, check: Any, rng: np.random.Generator) -> None:
    model = graph(
        """g (float[B, 48] x, float[32, 48] layer__weight) => (float[B, 32] y) {
            t = Transpose(layer__weight)
            y = MatMul(x, t)
        }""",
        layer__weight=rng.standard_normal((32, 48), dtype=np.float32),
    )
    feeds = {"x": rng.standard_normal((2, 48), dtype=np.float32)}
    done = check(CleanUp(), model, feeds, golden="y = MatMul(x, layer.weight)")
    assert list(done.model.graph.initializers) == ["layer.weight"]


def test_a_clean_graph_is_left_alone(graph: Any, check: Any) -> None:
    model = graph("g (float[B, 4] x) => (float[B, 4] y, float[B, 4] z) { y = Exp(x) z = Identity(x) }")
    done = check(CleanUp(), model, {"x": np.ones((2, 4), np.float32)}, golden="y = Exp(x)\nz = Identity(x)")
    assert not done.result.modified


def test_nodes_that_draw_random_numbers_are_not_merged(graph: Any, listing: Any) -> None:
    model = graph(
        """g (float[4] x) => (float[4] y) {
            a = RandomNormalLike(x)
            b = RandomNormalLike(x)
            y = Sub(a, b)
        }"""
    )
    before = listing(model)
    assert not CleanUp()(model).modified
    assert listing(model) == before


def test_reshapes_there_and_back(graph: Any, check: Any, rng: np.random.Generator) -> None:
    model = graph(
        """g (float[B, S, 6] x) => (float[B, S, 6] y, float[B, S, 6] z)
        <float[B, S, 2, 3] heads, float[B, S, 6] back, float[B, S, 6] same, float[S, B, 6] other, float[B, S, 6] w,
         int64[4] four = {0, 0, 2, 3}, int64[3] three = {0, 0, 6}, int64[3] swap = {3, 2, 6},
         int64[3] keep = {2, 3, 6}> {
            heads = Reshape(x, four)
            back = Reshape(heads, three)
            y = Exp(back)
            other = Reshape(x, swap)
            w = Neg(other)
            z = Reshape(w, keep)
        }"""
    )
    done = check(
        CleanUp(),
        model,
        {"x": rng.standard_normal((2, 3, 6), dtype=np.float32)},
        golden="""
            y = Exp(x)
            other = Reshape(x, swap)
            w = Neg(other)
            z = Reshape(w, keep)
        """,
    )
    assert done.result.report.matched["reshapes"] == 1


def test_sizes_that_are_known_are_folded(graph: Any, check: Any) -> None:
    model = graph(
        """g (float[B, S, 6] x) => (int64 y, int64 z) <int64 two = {2}, int64 one = {1}> {
            shape = Shape(x)
            size = Gather(shape, two)
            y = Div(size, two)
            rest = Shape<start=1>(x)
            unknown = Gather(shape, one)
            last = Gather(rest, one)
            z = Mul(last, unknown)
        }"""
    )
    done = check(CleanUp(), model, {"x": np.zeros((2, 3, 6), np.float32)})
    assert "Div" not in done.listing
    assert "unknown = Gather" in done.listing
    assert "last = Gather" not in done.listing
    assert done.result.report.matched["known sizes"] == 2
