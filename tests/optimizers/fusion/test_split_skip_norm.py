"""fuse-foreign on operators that add and normalise, as onnxruntime-genai's model builder writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.fuse_foreign import FuseForeign
from onnxpress.optimizers.fusion.fuse_skip_norm import FuseSkipNorm
from onnxpress.optimizers.fusion.split_skip_norm import split_skip_norms

X = "float[B, S, 8] x, float[B, S, 8] y"


@pytest.fixture
def feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal((2, 3, 8), dtype=np.float32) for name in "xy"}


@pytest.fixture
def scale(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(8, dtype=np.float32)


def test_a_sum_that_is_used_again(graph: Any, check: Any, feeds: Any, scale: Any) -> None:
    model = graph(
        f"""g ({X}, float[8] g) => (float[B, S, 8] z) <float[B, S, 8] s, float[B, S, 8] n> {{
            n, mean, deviation, s = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>(x, y, g)
            z = Mul(s, n)
        }}""",
        g=scale,
    )
    done = check(
        FuseForeign(),
        model,
        feeds,
        golden="""
            s = Add(x, y)
            n = SimplifiedLayerNormalization[axis=-1, epsilon=1e-05, stash_type=1](s, g)
            z = Mul(s, n)
        """,
    )
    assert done.result.report.matched == {"sum and normalisation": 1}


@pytest.mark.parametrize("shift", ["b", ""])
def test_layer_norm_with_a_bias_of_the_sum(graph: Any, check: Any, feeds: Any, scale: Any, shift: str) -> None:
    model = graph(
        f"""g ({X}, float[8] g, float[8] b, float[8] c) => (float[B, S, 8] n) {{
            n = com.microsoft.SkipLayerNormalization<epsilon=1e-5>(x, y, g, {shift}, c)
        }}""",
        g=scale,
        b=scale[::-1].copy(),
        c=2 * scale,
    )
    if not shift:
        del model.graph.initializers["b"]
    done = check(FuseForeign(), model, feeds)
    assert [node.op_type for node in done.model.graph] == ["Add", "Add", "LayerNormalization"]


def test_it_is_the_inverse_of_fuse_skip_norm(graph: Any, listing: Any, scale: Any) -> None:
    model = graph(
        f"""g ({X}, float[8] g) => (float[B, S, 8] z) <float[B, S, 8] s, float[B, S, 8] n> {{
            s = Add(x, y)
            n = SimplifiedLayerNormalization<axis=-1, epsilon=1e-5, stash_type=1>(s, g)
            z = Mul(s, n)
        }}""",
        g=scale,
    )
    before = listing(model)
    assert FuseSkipNorm()(model).report.matched
    split_skip_norms(model, Report())
    assert listing(model) == before


def test_a_deviation_that_is_used(graph: Any, listing: Any, scale: Any) -> None:
    """Not one that onnxruntime computes on a CPU, so it cannot be run; it must be left alone."""
    model: ir.Model = graph(
        f"""g ({X}, float[8] g) => (float[B, S, 8] n, float[B, S, 1] d) {{
            n, mean, d = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>(x, y, g)
        }}""",
        g=scale,
    )
    before = listing(model)
    split_skip_norms(model, report := Report())
    assert report.skipped == {"mean or deviation of a skip normalisation is used": 1}
    assert listing(model) == before
