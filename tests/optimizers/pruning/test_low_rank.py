"""low-rank: exact where weights are of low rank, seen as products afterwards, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.pruning.low_rank import LowRank
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic

Graph = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]

TEXTS = {
    "MatMul": "g (float[M, 64] x, float[64, 48] w) => (float[M, 48] y) { y = MatMul(x, w) }",
    "Gemm": "g (float[M, 64] x, float[48, 64] w, float[48] b) => (float[M, 48] y) { y = Gemm<transB = 1>(x, w, b) }",
    "Transpose": """g (float[M, 64] x, float[48, 64] w) => (float[M, 48] y)
        { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }""",
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", ["svd", "activation"])
def test_exact_rank(graph: Graph, check: Callable[..., Any], rng: np.random.Generator, text: str, method: Any) -> None:
    weight = (rng.standard_normal((64, 8)) @ rng.standard_normal((8, 48))).astype(np.float32)
    weights = {"w": weight if text == "MatMul" else weight.T.copy()}
    if text == "Gemm":
        weights["b"] = rng.standard_normal(48, dtype=np.float32)
    optimizer = LowRank(rank=8, method=method)
    context = Context(Calibration([{"x": rng.standard_normal((40, 64), dtype=np.float32)}]))
    run = partial(optimizer.run, context=context)
    x = rng.standard_normal((5, 64), dtype=np.float32)
    checked = check(run, graph(TEXTS[text], **weights), {"x": x}, tolerance=1e-3)
    assert checked.result.report.matched == {"products split in two": 1}
    assert checked.model.graph.initializers["w.reduce.weight"].shape == (64, 8)


def test_no_saving_no_split(graph: Graph, listing: Callable[[ir.Model], str]) -> None:
    model = graph(TEXTS["MatMul"], w=np.ones((64, 48), np.float32))
    before = listing(model)
    report = LowRank(rank=28, method="svd")(model).report  # type: ignore[attr-defined]
    assert report.skipped == {"two products would be no smaller": 1}
    assert listing(model) == before


def test_a_shared_weight_and_no_samples(graph: Graph) -> None:
    text = """g (float[M, 64] x, float[64, 48] w, int64[N] i) => (float[M, 48] y, float[N, 48] e)
        { y = MatMul(x, w)  e = Gather(w, i) }"""
    report = LowRank(rank=8, method="svd")(graph(text, w=np.ones((64, 48), np.float32))).report  # type: ignore[attr-defined]
    assert report.skipped == {"weight is shared": 1}
    report = LowRank(rank=8)(graph(TEXTS["MatMul"], w=np.ones((64, 48), np.float32))).report  # type: ignore[attr-defined]
    assert not report.matched
    assert report.skipped


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_later_passes_see_products(exported: Graph, name: str, allocation: Any) -> None:
    model = exported(name)
    size = sum(value.const_value.size for value in model.graph.initializers.values())  # type: ignore[union-attr]
    result = LowRank(ratio=0.5, method="svd", allocation=allocation, min_features=8)(model)
    count = result.report.matched["products split in two"]  # type: ignore[attr-defined]
    assert count
    assert sum(value.const_value.size for value in model.graph.initializers.values()) < size  # type: ignore[union-attr]
    for block in anatomy_of(model).blocks:
        attention = block.attentions[0]
        assert attention.output is not None
        assert str(attention.query.name).endswith(".weight")
        assert not attention.query.name.endswith(".reduce.weight")
    for later in (QuantizeDynamic("uint8", "per_token", min_features=2), QuantizeBlocks(min_features=2)):
        copy = model.clone()
        assert later(copy).report.matched  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "ratio": 0.5}, {"rank": 0}, {"ratio": 1.0}, {"rank": 2, "allocation": "global"}]
)
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rank|ratio"):
        LowRank(**options)
