"""fuse-foreign on products of flat matrices and on tables that are stored as the head reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_ir.passes import common

from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.fusion.fuse_foreign import FuseForeign
from onnxpress.optimizers.fusion.unflatten import drop_empty_slices, join_slices, turn_tables, unflatten_products

FLAT = """g (float[B, S, 8] x, float[8, 16] w, float[16] b) => (float[B, S, 16] z)
    <int64[2] flat = {-1, 8}, int64[1] last = {16}, float[B, S, 16] y, float[N, 8] xs> {
    xs = Reshape(x, flat)
    p = Gemm<alpha=1.0, beta=1.0>(xs, w, b)
    leading = Shape<start=0, end=2>(x)
    shape = Concat<axis=0>(leading, last)
    y = Reshape(p, shape)
    z = Tanh(y)
}"""


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"w": rng.standard_normal((8, 16), dtype=np.float32), "b": rng.standard_normal(16, dtype=np.float32)}


def test_a_flat_product(graph: Any, check: Any, rng: np.random.Generator, weights: Any) -> None:
    feeds = {"x": rng.standard_normal((2, 3, 8), dtype=np.float32)}
    done = check(FuseForeign(), graph(FLAT, **weights), feeds)
    assert done.result.report.matched == {"products of flat matrices": 1}
    assert [node.op_type for node in done.model.graph] == ["MatMul", "Add", "Tanh"]


NEAR_MISSES = {
    "scaled": ("alpha=1.0", "alpha=2.0"),
    "other leading sizes": ("float[B, S, 16] y", "float[T, S, 16] y"),
    "unknown sizes": ("float[B, S, 16] y,", ""),
    "the flat product is read elsewhere": ("z = Tanh(y)", "t = Tanh(y) m = ReduceMean<keepdims=0>(p) z = Add(t, m)"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(graph: Any, weights: Any, name: str) -> None:
    model = graph(FLAT.replace(*NEAR_MISSES[name]), **weights)
    unflatten_products(model.graph, report := Report())
    assert not report.matched
    assert "Gemm" in {node.op_type for node in model.graph}


TABLE = """g (int64[B, S] ids, float[8, 200] w) => (float[B, S, 200] logits) <float[200, 8] t, float[B, S, 8] x> {
    t = Transpose<perm=[1, 0]>(w)
    x = Gather(t, ids)
    logits = MatMul(x, w)
}"""


def test_a_table_that_is_the_head_too(graph: Any, check: Any, rng: np.random.Generator) -> None:
    model = graph(TABLE, w=rng.standard_normal((8, 200), dtype=np.float32))
    for node in model.graph:
        if node.op_type == "Gather":
            node.name = "/model/embed_tokens/Gather"
    done = check(FuseForeign(), model, {"ids": np.array([[1, 5, 199]])})
    assert done.result.report.matched == {"tables": 1}
    table = done.model.graph.initializers["model.embed_tokens.weight"]
    assert list(table.shape) == [200, 8]
    assert {(node.op_type, index) for node, index in table.uses()} == {("Gather", 0), ("Transpose", 0)}


def test_a_table_that_something_else_reads(graph: Any, rng: np.random.Generator) -> None:
    text = TABLE.replace("logits = MatMul(x, w)", "p = MatMul(x, w) n = ReduceSum<keepdims=0>(w) logits = Add(p, n)")
    model = graph(text, w=rng.standard_normal((8, 200), dtype=np.float32))
    turn_tables(model.graph, report := Report())
    assert report.skipped == {"table is read by more than lookups and products": 1}
    assert not report.matched


HALVES = """g (float[B, S, 8] x, float[8, 12] w) => (float[B, S, 6] z)
    <float[B, S, 12] p, int64[1] zero = {0}, int64[1] half = {6}, int64[1] all = {12}, int64[1] last = {-1}> {
    p = MatMul(x, w)
    second = Slice(p, half, all, last)
    first = Slice(p, zero, half, last)
    a = Sigmoid(first)
    z = Mul(a, second)
}"""


def test_halves_of_a_packed_product(graph: Any, check: Any, rng: np.random.Generator) -> None:
    feeds = {"x": rng.standard_normal((2, 3, 8), dtype=np.float32)}
    done = check(FuseForeign(), graph(HALVES, w=rng.standard_normal((8, 12), dtype=np.float32)), feeds)
    assert done.result.report.matched == {"slices as one split": 1}
    split = next(node for node in done.model.graph if node.op_type == "Split")
    assert split.inputs[1] is not None
    assert split.inputs[1].const_value is not None
    assert split.inputs[1].const_value.numpy().tolist() == [6, 6]


@pytest.mark.parametrize(
    ("old", "new"),
    [("half = {6}", "half = {5}"), ("p = MatMul(x, w)", "q = MatMul(x, w) p = Tanh(q)"), ("last = {-1}", "last = {1}")],
    ids=["no share of the width", "no product", "another axis"],
)
def test_slices_that_stay(graph: Any, rng: np.random.Generator, old: str, new: str) -> None:
    text = HALVES.replace("second = Slice(p, half,", "second = Slice(p, six,").replace(
        "half = {6}", "half = {6}, int64[1] six = {6}"
    )
    model = graph(text.replace(old, new), w=rng.standard_normal((8, 12), dtype=np.float32))
    join_slices(model.graph, report := Report())
    assert not report.matched


EMPTY = "s1 = Slice(p, first, all, last)  s2 = Slice(p, all, end, last)  c = Concat<axis = -1>(s1, s2)  y = Neg(c)"


@pytest.mark.parametrize(
    ("body", "want"),
    [(EMPTY, "y = Neg(p)"), (EMPTY.replace("Concat<axis = -1>(s1, s2)", "Concat<axis = 1>(s1, s1)"), None)],
)
def test_a_part_that_is_all(graph: Any, listing: Any, body: str, want: str | None) -> None:
    model = graph(
        f"""g (float[B, 3, 4] p) => (float[B, N, M] y) <int64[1] first = {{0}}, int64[1] all = {{4}},
        int64[1] end = {{9223372036854775807}}, int64[1] last = {{2}}> {{ {body} }}"""
    )
    common.ShapeInferencePass()(model)
    drop_empty_slices(model.graph, report := Report())
    CleanUp()(model)
    assert report.matched["empty slices"] == (2 if want else 1)
    assert listing(model) == (want or "c = Concat[axis=1](p, p)\ny = Neg(c)")


def test_a_part_that_is_not_all(graph: Any) -> None:
    model = graph(
        f"""g (float[B, 3, 6] p) => (float[B, N, M] y) <int64[1] first = {{0}}, int64[1] all = {{4}},
        int64[1] end = {{9223372036854775807}}, int64[1] last = {{2}}> {{ {EMPTY} }}"""
    )
    common.ShapeInferencePass()(model)
    drop_empty_slices(model.graph, report := Report())
    assert not report.matched
