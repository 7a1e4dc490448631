"""awq: changes no output, makes blocks better, folds only where it gains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UsageError
from onnxpress.optimizers import recipe
from onnxpress.optimizers.base import Context, PassResult
from onnxpress.optimizers.quantization.awq import Awq
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks

Graph = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]

MLP = """g (float[B, S, 64] x, float[64] gain, float[64, 96] gate, float[64, 96] up, float[96, 64] down)
    => (float[B, S, 64] y) {
        n = SimplifiedLayerNormalization<axis = -1, epsilon = 1e-5>(x, gain)
        a = MatMul(n, gate)  s = Sigmoid(a)  b = MatMul(n, up)  m = Mul(s, b)  y = MatMul(m, down) }"""


@pytest.fixture
def mlp(graph: Graph, rng: np.random.Generator) -> ir.Model:
    shapes = {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    weights["up"] *= np.exp(rng.standard_normal(96)).astype(np.float32)
    return graph(MLP, gain=np.exp(1.5 * rng.standard_normal(64)).astype(np.float32), **weights)


@pytest.fixture
def x(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.standard_normal((4, 100, 64), dtype=np.float32)}


def calibrated(x: dict[str, np.ndarray], optimizer: Awq) -> Callable[[ir.Model], PassResult]:
    return partial(optimizer.run, context=Context(Calibration([x])))


def test_outputs_stay_and_blocks_lose_less(mlp: ir.Model, run: Run, x: dict[str, np.ndarray]) -> None:
    (expected,) = run(mlp, x)
    scaled = mlp.clone()
    report = calibrated(x, Awq())(scaled).report  # type: ignore[attr-defined]
    assert report.matched == {"norm and its products": 1, "product and those that it feeds": 1}
    np.testing.assert_allclose(run(scaled, x)[0], expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())
    for weight in ("gate", "up", "down"):
        assert 0 < report.errors[weight] < report.errors[f"{weight} without awq"]
    errors = []
    for model in (mlp, scaled):
        QuantizeBlocks(4, 32, method="nearest", accuracy_level=0)(model)
        errors.append(float(np.square(run(model, x)[0] - expected).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_a_quantized_graph_has_nothing_left(mlp: ir.Model, x: dict[str, np.ndarray]) -> None:
    QuantizeBlocks(4, 32)(mlp)
    assert not calibrated(x, Awq())(mlp).report.matched  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("optimizer", "reason", "count"),
    [(Awq(sites=("norm",), exclude=["up"]), "excluded by name", 1), (Awq(include=["up"]), "excluded by name", 2)],
)
def test_what_is_left_alone(mlp: ir.Model, x: dict[str, np.ndarray], optimizer: Awq, reason: str, count: int) -> None:
    before = {name: np.array(value.const_value) for name, value in mlp.graph.initializers.items()}
    report = calibrated(x, optimizer)(mlp).report  # type: ignore[attr-defined]
    assert report.skipped[reason] == count
    assert not report.matched
    for name, value in mlp.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value, before[name])


def test_even_channels_gain_nothing(graph: Graph, rng: np.random.Generator) -> None:
    """All channels as loud as each other: no strength scales anything, and nothing is touched."""
    weights = {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}
    model = graph(
        MLP,
        gain=np.ones(64, np.float32),
        **{name: rng.standard_normal(shape, dtype=np.float32) for name, shape in weights.items()},
    )
    signs = np.sign(rng.standard_normal((2, 300, 64))).astype(np.float32)
    report = calibrated({"x": signs}, Awq(sites=("norm",)))(model).report  # type: ignore[attr-defined]
    assert report.skipped["nothing gained"] == 1


def test_no_samples(mlp: ir.Model) -> None:
    assert Awq()(mlp).report.skipped["no sample inputs for this graph"] == 2  # type: ignore[attr-defined]


def test_options() -> None:
    with pytest.raises(ValueError, match="strengths"):
        Awq(strengths=0)
    with pytest.raises(UsageError, match="block_size"):
        recipe.PassSpec("awq", {"block_size": 24}).build()
