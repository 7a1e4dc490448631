from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.optimizers.fusion.fuse_skip_norm import FuseSkipNorm

X = "float[B, S, 8] x, float[B, S, 8] y"


@pytest.fixture
def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal((2, 3, 8), dtype=np.float32) for name in "xy"}


@pytest.fixture
def scale(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(8, dtype=np.float32)


def block(norm: str) -> str:
    """A pre-norm block: the sum feeds the normalisation and the next sum."""
    return f"""g ({X}, float[8] g, float[8] b) => (float[B, S, 8] z) <float[B, S, 8] s, float[B, S, 8] n> {{
        s = Add(x, y)
        n = {norm}
        z = Mul(s, n)
    }}"""


@pytest.mark.parametrize("norm", ["SimplifiedLayerNormalization", "RMSNormalization"])
def test_rms_norm_whose_sum_is_used_again(graph: Any, check: Any, feeds: Any, scale: Any, norm: str) -> None:
    header = '<ir_version: 10, opset_import: ["": 23]>\n'
    model = graph(block(f"{norm}<axis=-1, epsilon=1e-5>(s, g)"), header=header, g=scale, b=scale)
    done = check(
        FuseSkipNorm(),
        model,
        feeds,
        golden="""
            n, , , s = SkipSimplifiedLayerNormalization[epsilon=1e-05](x, y, g)
            z = Mul(s, n)
        """,
    )
    assert done.result.report.matched == {"SkipSimplifiedLayerNormalization": 1}
    assert done.model.opset_imports["com.microsoft"] == 1


def test_layer_norm_whose_sum_is_not_used_again(graph: Any, check: Any, feeds: Any, scale: Any) -> None:
    model = graph(
        f"""g ({X}, float[8] g, float[8] b) => (float[B, S, 8] n) <float[B, S, 8] s> {{
            s = Add(x, y)
            n = LayerNormalization<axis=2, epsilon=1e-12>(s, g, b)
        }}""",
        g=scale,
        b=scale,
    )
    check(FuseSkipNorm(), model, feeds, golden="n = SkipLayerNormalization[epsilon=1e-12](x, y, g, b)")


def test_bias_of_the_product_moves_into_the_operator(graph: Any, check: Any, feeds: Any, scale: Any) -> None:
    model = graph(
        f"""g ({X}, float[8] g, float[8] b, float[8] c) => (float[B, S, 8] n) <float[B, S, 8] s, float[B, S, 8] d> {{
            d = Add(c, y)
            s = Add(d, x)
            n = LayerNormalization<axis=-1>(s, g, b)
        }}""",
        g=scale,
        b=scale + 1,
        c=scale + 2,
    )
    golden = "n = SkipLayerNormalization[epsilon=1e-05](y, x, g, b, c)"
    check(FuseSkipNorm(), model, feeds, golden=golden)


def test_the_sum_stays_a_graph_output(graph: Any, check: Any, feeds: Any, scale: Any) -> None:
    model = graph(
        f"""g ({X}, float[8] g) => (float[B, S, 8] s, float[B, S, 8] n) {{
            s = Add(x, y)
            n = SimplifiedLayerNormalization<axis=-1>(s, g)
        }}""",
        g=scale,
    )
    check(FuseSkipNorm(), model, feeds)


def test_the_sum_is_read_before_the_normalisation(graph: Any, check: Any, feeds: Any, scale: Any) -> None:
    model = graph(
        f"""g ({X}, float[8] g) => (float[B, S, 8] z) <float[B, S, 8] s, float[B, S, 8] n, float[B, S, 8] a> {{
            s = Add(x, y)
            a = Tanh(s)
            n = SimplifiedLayerNormalization<axis=-1>(s, g)
            z = Add(n, a)
        }}""",
        g=scale,
    )
    check(FuseSkipNorm(), model, feeds)


def test_two_normalisations_of_one_sum(graph: Any, check: Any, feeds: Any, scale: Any) -> None:
    """As in parallel attention and feed-forward blocks: one fuses, the other reads the sum that it returns."""
    model = graph(
        f"""g ({X}, float[8] g) => (float[B, S, 8] z) <float[B, S, 8] s, float[B, S, 8] n, float[B, S, 8] m> {{
            s = Add(x, y)
            n = SimplifiedLayerNormalization<axis=-1>(s, g)
            m = SimplifiedLayerNormalization<axis=-1, epsilon=0.5>(s, g)
            z = Add(n, m)
        }}""",
        g=scale,
    )
    done = check(FuseSkipNorm(), model, feeds)
    assert done.result.report.matched == {"SkipSimplifiedLayerNormalization": 1}


NEAR_MISSES = {
    "operands of the sum are not known to have the same shape": (
        "float[B, S, 8] x, float[1, S, 8] y",
        "LayerNormalization<axis=-1>(s, g)",
    ),
    "normalises over more than the last axis": (X, "LayerNormalization<axis=1>(s, h)"),
    "scale is not a constant": (X + ", float[8] w", "LayerNormalization<axis=-1>(s, w)"),
    "scale is not a vector": (X, "LayerNormalization<axis=-1>(s, k)"),
    "rank 4; the fused operator takes 2 or 3": (
        "float[B, S, 2, 8] x, float[B, S, 2, 8] y",
        "LayerNormalization<axis=-1>(s, g)",
    ),
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_near_misses(graph: Any, run: Any, listing: Any, scale: Any, reason: str) -> None:
    inputs, norm = NEAR_MISSES[reason]
    shape = inputs.split(" x")[0]
    weights = {"g": scale, "h": np.ones((3, 8), np.float32), "k": np.ones((1, 8), np.float32)}
    used = {name: array for name, array in weights.items() if f", {name})" in norm}
    declared = "".join(f", float[{', '.join(map(str, array.shape))}] {name}" for name, array in used.items())
    model = graph(f"g ({inputs}{declared}) => ({shape} n) <{shape} s> {{ s = Add(x, y) n = {norm} }}", **used)
    before = listing(model)
    result = FuseSkipNorm()(model)
    assert dict(result.report.skipped) == {reason: 1}
    assert not result.modified
    assert listing(model) == before


def test_unknown_shapes_are_left_alone(graph: Any, scale: Any) -> None:
    model: ir.Model = graph(block("SimplifiedLayerNormalization<axis=-1>(s, g)"), g=scale, b=scale)
    model.graph.node(0).outputs[0].shape = None
    assert dict(FuseSkipNorm()(model).report.skipped) == {"shape is not known": 1}
