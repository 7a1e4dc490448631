"""GPTQ and importance through quantize-blocks: better than without samples, a block at a time, refused without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.known_results import KnownResults
from onnxpress.errors import BadInputError
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.quantization.quantize_blocks import Method, QuantizeBlocks

WIDTH = 64
LAYERS = f"""
    agraph (int64[batch_size, n] input_ids, int64[batch_size, n] attention_mask, float[200, {WIDTH}] table,
        float[{WIDTH}, 96] h__0__up, float[96, {WIDTH}] h__0__down,
        float[{WIDTH}, 96] h__1__up, float[96, {WIDTH}] h__1__down, float[{WIDTH}, 50] head)
        => (float[batch_size, n, 50] logits) {{
        e = Gather (table, input_ids)
        a = MatMul (e, h__0__up)
        b = Tanh (a)
        c = MatMul (b, h__0__down)
        s = Add (e, c)
        f = MatMul (s, h__1__up)
        g = Tanh (f)
        i = MatMul (g, h__1__down)
        t = Add (s, i)
        logits = MatMul (t, head)
    }}"""


@pytest.fixture
def layers(graph: Callable[..., ir.Model], rng: np.random.Generator) -> ir.Model:
    """Two layers whose hidden states live in a few correlated directions, some channels loud."""
    loudness = np.exp(rng.normal(0, 1.5, WIDTH))
    table = rng.standard_normal((200, 12)) @ rng.standard_normal((12, WIDTH)) * loudness
    shapes = {"h__0__up": (WIDTH, 96), "h__0__down": (96, WIDTH), "h__1__up": (WIDTH, 96), "h__1__down": (96, WIDTH)}
    weights = {name: rng.standard_normal(shape) / 8 for name, shape in {**shapes, "head": (WIDTH, 50)}.items()}
    return graph(LAYERS, table=table.astype(np.float32), **{k: v.astype(np.float32) for k, v in weights.items()})


def rows(rng: np.random.Generator, count: int, length: int = 40) -> list[dict[str, NDArray[np.int64]]]:
    mask = np.ones((4, length), np.int64)
    mask[0, :5] = 0
    return [{"input_ids": rng.integers(0, 200, (4, length)), "attention_mask": mask} for _ in range(count)]


def quantized(model: ir.Model, method: Method, samples: Any = (), **options: Any) -> tuple[ir.Model, Any]:
    copy = copy_graph(model)
    optimizer = QuantizeBlocks(bits=4, block_size=32, method=method, zero_points="integer", **options)
    context = Context(Calibration(samples))
    return copy, optimizer.run(copy, context).report


def test_each_statistic_buys_quality(
    layers: ir.Model, run: Callable[..., list[NDArray[Any]]], rng: np.random.Generator
) -> None:
    """On inputs that the methods did not see."""
    samples, held_out = rows(rng, 4), rows(rng, 1)[0]
    (expected,) = run(layers, held_out)
    errors = {}
    for method in ("nearest", "importance", "gptq"):
        model, report = quantized(layers, method, samples)
        assert sum(report.matched.values()) == 5
        (found,) = run(model, held_out)
        errors[method] = float(np.square(found - expected).mean())
        assert (len(report.errors) == 5) is (method != "nearest")
    assert errors["gptq"] < 0.7 * errors["importance"] < 0.7 * errors["nearest"]


def test_products_make_up_for_what_those_before_them_lost(layers: ir.Model, rng: np.random.Generator) -> None:
    """The second layer's weights depend on how the first was quantized."""
    samples = rows(rng, 3)
    whole, _ = quantized(layers, "gptq", samples)
    second, _ = quantized(layers, "gptq", samples, include=["h.1.*"])
    name = "h.1.up.q4b32"
    one, other = (model.graph.initializers[name].const_value for model in (whole, second))
    assert one is not None
    assert other is not None
    assert (one.numpy() != other.numpy()).any()


def test_a_weight_of_two_graphs_is_fitted_once(layers: ir.Model, rng: np.random.Generator) -> None:
    """As in an encoder-decoder's two decoders, which share one file of weights."""
    first, second = copy_graph(layers), copy_graph(layers)
    table = second.graph.initializers["h.1.down"]
    assert table.const_value is not None
    table.const_value = ir.tensor(table.const_value.numpy() * np.float32(1.01))  # another weight of the same name
    optimizer = QuantizeBlocks(bits=4, block_size=32, method="gptq", zero_points="integer")
    known = KnownResults()
    for model in (first, second):
        context = Context(Calibration(rows(rng, 3)), known=known)
        assert optimizer.run(model, context).modified
    for name in ("h.0.up", "h.0.down", "h.1.up", "h.1.down"):
        one, other = (model.graph.initializers[f"{name}.scales"].const_value for model in (first, second))
        assert one is not None
        assert other is not None
        assert (one.numpy() == other.numpy()).all() == (name != "h.1.down"), name


def test_too_few_tokens(layers: ir.Model, rng: np.random.Generator) -> None:
    with pytest.raises(BadInputError, match=r"gptq has 19 tokens to calibrate with; it needs at least 256"):
        quantized(
            layers,
            "gptq",
            [
                {key: value[:1, -19:] for key, value in rows(rng, 1)[0].items()}
                | {"attention_mask": np.ones((1, 19), np.int64)}
            ],
        )


def test_without_samples_for_the_graph_nothing_happens(layers: ir.Model) -> None:
    _, report = quantized(layers, "gptq")
    assert not report.matched
    assert report.skipped == {"no sample inputs for this graph": 5}
