"""quantize-experts: QMoE against MoE with the weights that its codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress import pipeline
from onnxpress.exporter import architectures
from onnxpress.optimizers.quantization.maths.block_format import BlockFormat
from onnxpress.optimizers.quantization.maths.least_squares import round_to_nearest
from onnxpress.optimizers.quantization.quantize_experts import QuantizeExperts
from onnxpress.requests import Judging

Graph = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]
MIXTURE = """g (float[T, 64] x, float[T, 4] logits, float[4, 256, 64] up, float[4, 64, 128] down) => (float[T, 64] y) {
    y = com.microsoft.MoE <activation_type = "swiglu", swiglu_fusion = 1, activation_alpha = 1.0, activation_beta = 0.0,
        k = 2, normalize_routing_weights = NORMALIZED> (x, logits, up, , down) }"""


def mixture(graph: Graph, normalized: int, **weights: np.ndarray) -> ir.Model:
    return graph(MIXTURE.replace("NORMALIZED", str(normalized)), **weights)


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"up": (4, 256, 64), "down": (4, 64, 128)}
    return {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def decoded(weight: np.ndarray, format: BlockFormat) -> np.ndarray:
    return np.stack([round_to_nearest(expert.T, format).dequantize().T for expert in weight])


@pytest.mark.parametrize("normalized", [0, 1])
@pytest.mark.parametrize("zero_points", ["none", "integer"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_mixture_is_that_of_the_decoded_weights(
    graph: Graph,
    run: Run,
    rng: np.random.Generator,
    weights: Any,
    normalized: int,
    zero_points: Any,
    bits: Any,
    tokens: int,
) -> None:
    format = BlockFormat(bits, 32, zero_points)
    reference = mixture(graph, normalized, **{name: decoded(weight, format) for name, weight in weights.items()})
    model = mixture(graph, normalized, **weights)
    level = 0 if bits == 4 else 4
    result = QuantizeExperts(bits, 32, zero_points, "nearest", accuracy_level=level)(model)  # type: ignore[arg-type]
    assert result.report.matched == {f"QMoE {bits} bits, blocks of 32": 1}  # type: ignore[attr-defined]
    assert [node.op_type for node in model.graph] == ([] if normalized else ["Softmax"]) + ["QMoE"]
    assert not {"up", "down"} & set(model.graph.initializers)
    feeds = {name: rng.standard_normal((tokens, size), np.float32) for name, size in (("x", 64), ("logits", 4))}
    (expected,), (found,) = run(reference, feeds), run(model, feeds)
    # The kernel of 8 bits rounds activations to 127ths of the largest of 32: 0.6% of a normal one's size, twice.
    np.testing.assert_allclose(found, expected, atol=(1e-5 if bits == 4 else 0.05) * np.abs(expected).max())
    assert not QuantizeExperts()(model).modified


def test_what_is_left_alone(graph: Graph, weights: Any) -> None:
    def skipped(model: ir.Model, **options: Any) -> dict[str, int]:
        return dict(QuantizeExperts(**options)(model).report.skipped)  # type: ignore[attr-defined]

    assert skipped(mixture(graph, 1, **weights), block_size=128) == {"blocks do not divide the inputs of experts": 1}
    assert skipped(mixture(graph, 1, **weights), exclude=["do*"]) == {"excluded by name": 1}
    assert skipped(mixture(graph, 1, up=weights["up"])) == {"weights of experts are not constant": 1}
    third = graph(MIXTURE.replace("NORMALIZED", "1").replace(", , down", ", , down, , up"), **weights)
    assert skipped(third) == {"experts of three products": 1}
    with pytest.raises(ValueError, match="bits"):
        QuantizeExperts(2, 16)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_model_is_built_and_verified(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))
    architectures.tiny_model(architecture, tmp_path / "model")
    exported = pipeline.export(str(tmp_path / "model"), output=tmp_path / "exported")
    result = pipeline.optimize(
        str(exported.path), recipe=["quantize-experts"], output=tmp_path / "out", judging=Judging(benchmark=False)
    )
    assert sum(result.steps[-1].matched.values()) == 4
    assert result.manifest.metrics["kl"] < 0.01
