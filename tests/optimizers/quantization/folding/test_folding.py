"""Folding sites: random factors change no output, and what keeps factors out is named. smooth, equalize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxpress.arrays import Array
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.feeds import feed_of
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.quantization.equalize import Equalize
from onnxpress.optimizers.quantization.folding import FoldingSite, find_folding_sites
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic
from onnxpress.optimizers.quantization.smooth import Smooth

Graph = Callable[..., ir.Model]
Run = Callable[..., list[Array]]


def sites(model: ir.Model) -> tuple[list[FoldingSite], Counter[str]]:
    report = Report()
    return find_folding_sites(model.graph, report), report.skipped


def fold_randomly(model: ir.Model, seed: int = 0) -> list[FoldingSite]:
    """Factors between 1/8 and 8, equal within groups."""
    rng = np.random.default_rng(seed)
    found, _ = sites(model)
    for site in found:
        site.fold(np.exp2(site.tied(rng.uniform(-3, 3, site.features))).astype(np.float32))
    return found


def weights(text: str, rng: np.random.Generator) -> dict[str, Array]:
    """A random array for every input that the text types with numbers alone: float[64, 32] w."""
    import re

    found = re.findall(r"float\[([\d, ]+)\] (\w+)", text.split("=>")[0])
    return {
        name: rng.standard_normal([int(size) for size in sizes.split(",")]).astype(np.float32) for sizes, name in found
    }


HEAD = """g (float[B, S, 64] x, float[64] gain, float[64] beta, float[64, 96] a, float[96] c, float[64, 96] b,
    float[96, 32] d, float[32, 48] f)"""
# fmt: off
EXACT = {
    "norm": ("n = LayerNormalization(x, gain, beta)  y = MatMul(n, a)  z = MatMul(n, b)", ["norm"]),
    "a norm that is spelled out": ("m = Mul(x, gain)  n = Add(m, beta)  y = MatMul(n, a)  z = MatMul(n, b)", ["norm"]),
    "nothing between": ("h = MatMul(x, a)  y = MatMul(h, d)  z = MatMul(x, b)", ["up"]),
    "relu": ("h = MatMul(x, a)  i = Add(h, c)  r = Relu(i)  y = MatMul(r, d)  z = MatMul(x, b)", ["up"]),
    "gate": ("""g = MatMul(x, a)  s = Sigmoid(g)  t = Mul(g, s)  h = MatMul(x, b)  u = Mul(t, h)  y = MatMul(u, d)
                z = Identity(g)""", ["up"]),
    "up before gate": ("""g = MatMul(x, a)  s = Gelu(g)  h = MatMul(x, b)  i = Add(c, h)  u = Mul(i, s)
                z = Identity(g)  y = MatMul(u, d)""", ["up"]),
    "slices": ("""h = MatMul(x, a)  e = Constant<value_ints = [96]>()  o = Constant<value_ints = [0]>()
                t = Constant<value_ints = [-1]>()  m = Constant<value_ints = [64]>()
                i = Slice(h, o, m, t)  j = Slice(h, m, e, t)  y = MatMul(j, f)  z = Gelu(i)""", ["up"]),
    "one plus a gain": ("""o = Constant<value_float = 1.0>()  e = Add(gain, o)  n = SimplifiedLayerNormalization(x, e)
                y = MatMul(n, a)  z = MatMul(n, b)""", ["norm"]),
    "half": ("k = Constant<value_float = 0.5>()  h = MatMul(x, a)  u = Mul(k, h)  y = MatMul(u, d)  z = MatMul(x, b)",
             ["up"]),
}
NEAR_MISSES = {
    "bends": ("h = MatMul(x, a)  r = Gelu(h)  y = MatMul(r, d)  z = MatMul(x, b)", "Gelu keeps factors out"),
    "residual": ("h = MatMul(x, a)  y = MatMul(h, d)  z = Identity(h)", "input is read by more than products"),
    "square": ("h = MatMul(x, a)  u = Mul(h, h)  y = MatMul(u, d)  z = MatMul(x, b)",
               "input is read by more than products"),
    "sum": ("h = MatMul(x, a)  i = MatMul(x, b)  u = Add(h, i)  y = MatMul(u, d)  z = Identity(u)",
            "input is read by more than products"),
    "sum alone": ("h = MatMul(x, a)  i = MatMul(x, b)  u = Add(h, i)  y = MatMul(u, d)  z = MatMul(x, b)",
                  "Add of two activations keeps factors out"),
    "shared source": ("h = MatMul(x, a)  y = MatMul(h, d)  z = MatMul(x, a)", "weight is shared"),
    "shared reader": ("h = MatMul(x, a)  y = MatMul(h, d)  i = MatMul(x, b)  r = Gelu(i)  z = MatMul(r, d)",
                      "weight is shared"),
    "gain that is computed": ("e = Sigmoid(gain)  n = LayerNormalization(x, e)  y = MatMul(n, a)  z = MatMul(n, b)",
                              "gain or bias is not a float32 constant per channel"),
}
# fmt: on


def mlp(graph: Graph, body: str, rng: np.random.Generator) -> ir.Model:
    return graph(
        f"{HEAD} => (float[B, S, N] y, float[B, S, M] z) <float[B, S, 96] h> {{ {body} }}", **weights(HEAD, rng)
    )


@pytest.mark.parametrize("name", EXACT)
def test_factors_change_nothing(graph: Graph, run: Run, rng: np.random.Generator, name: str) -> None:
    body, kinds = EXACT[name]
    model = mlp(graph, body, rng)
    x = {"x": rng.standard_normal((2, 5, 64), dtype=np.float32)}
    before = run(model, x)
    peaks = {site.activation.name: site.weight_peaks() for site in sites(model)[0]}
    assert [site.kind for site in fold_randomly(model)] == kinds
    assert any(not np.allclose(site.weight_peaks(), peaks[site.activation.name]) for site in sites(model)[0])
    for found, expected in zip(run(model, x), before, strict=True):
        # Two roundings more for each of up to 96 terms, of 2^-24 of the largest.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_keeps_factors_out(graph: Graph, rng: np.random.Generator, name: str) -> None:
    body, reason = NEAR_MISSES[name]
    found, skipped = sites(mlp(graph, body, rng))
    assert not found
    assert skipped[reason]


PROJECTIONS = """g (float[B, S, 64] x, float[64, 64] q, float[64, 32] k, float[64, 32] v, float[32] bias,
    float[64, 48] o)
    => (float[B, S, 48] y) {{ Q = MatMul(x, q)  K = MatMul(x, k)  U = MatMul(x, v)  V = Add(U, bias)
        {0}  y = MatMul(h, o) }}"""
ATTENTIONS = {
    "grouped": "h = Attention<q_num_heads = 4, kv_num_heads = 2>(Q, K, V)",
    "keys are values": "h = Attention<q_num_heads = 4, kv_num_heads = 2>(Q, V, V)",
}
OPSET_23 = '<ir_version: 11, opset_import: ["": 23, "com.microsoft": 1]>\n'


@pytest.mark.parametrize("kind", ATTENTIONS)
@given(seed=st.integers(0, 2**16))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_through_attention(graph: Graph, run: Run, kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = PROJECTIONS.format(ATTENTIONS[kind])
    model = graph(text, header=OPSET_23, **weights(text, rng))
    x = {"x": rng.standard_normal((2, 5, 64), dtype=np.float32)}
    (expected,) = run(model, x)
    found = fold_randomly(model, seed)
    if kind == "keys are values":
        assert not found
        return
    (site,) = found
    assert site.kind == "value"
    # Query heads 0 and 1 share key/value head 0, heads 2 and 3 share head 1; 16 channels each.
    np.testing.assert_array_equal(site.groups, np.tile(np.arange(32).reshape(2, 1, 16), (1, 2, 1)).ravel())
    with pytest.raises(ValueError, match="different factors"):
        site.fold(np.linspace(1, 2, 64, dtype=np.float32))
    np.testing.assert_allclose(run(model, x)[0], expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())


def test_a_gain_that_another_norm_uses_is_left_to_it(graph: Graph, run: Run, rng: np.random.Generator) -> None:
    body = (
        """n = LayerNormalization(x, gain, beta)  y = MatMul(n, a)  m = Mul(n, gain)  z = LayerNormalization(x, gain)"""
    )
    body = body.replace("m = Mul(n, gain)  ", "")
    model = mlp(graph, body, rng)
    x = {"x": rng.standard_normal((2, 5, 64), dtype=np.float32)}
    before = run(model, x)
    assert len(fold_randomly(model)) == 1
    for found, expected in zip(run(model, x), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


# fmt: off
FAMILIES = {
    ("llama", "model"): {"norm": 8, "up": 4, "value": 4},
    ("gpt2", "model"): {"norm": 8, "value": 4},
    ("opt", "model"): {"norm": 8, "up": 4, "value": 4},
    ("phi3", "model"): {"norm": 9, "up": 4, "value": 4},  # head included: it has a weight of its own
    ("gemma2", "model"): {"norm": 8, "up": 4, "value": 4},
    ("bert", "model"): {"value": 4},
    ("modernbert", "model"): {"norm": 11, "up": 6},
    ("t5", "encoder_model"): {"norm": 8, "up": 4, "value": 4},
    ("t5", "decoder_model"): {"norm": 12, "up": 4},  # values are cached for the other decoder
    ("t5", "decoder_with_past_model"): {"norm": 12, "up": 4},
    ("whisper", "decoder_with_past_model"): {"norm": 12},
}
# fmt: on


@pytest.mark.parametrize(("name", "stem"), FAMILIES)
def test_exported_models(name: str, stem: str, exported: Callable[..., ir.Model], run: Run) -> None:
    """The sites of each family; prompts and cached steps stay the same with the factors folded."""
    model = exported(name, stem)
    assert Counter(site.kind for site in sites(model)[0]) == FAMILIES[name, stem]
    if stem != "model":
        return
    ids = np.random.default_rng(0).integers(3, 100, (2, 7))
    before, folded = answers(model, ids, run), model.clone()
    fold_randomly(folded)
    for found, expected in zip(answers(folded, ids, run), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def answers(model: ir.Model, ids: Array, run: Run) -> list[Array]:
    """The first output for all tokens at once and, where there is a cache, for one token behind four."""

    def feeds(start: int, stop: int, cache: dict[str, Array]) -> dict[str, Array]:
        positions = np.broadcast_to(np.arange(start, stop), (len(ids), stop - start)).copy()
        sample = {"input_ids": ids[:, start:stop], "attention_mask": np.ones((len(ids), stop), np.int64)}
        sample |= {"position_ids": positions, "token_type_ids": np.zeros_like(positions)} | cache
        return {str(value.name): feed_of(value, sample) for value in model.graph.inputs}

    found = [run(model, feeds(0, 7, {}))[0]]
    names = [str(value.name) for value in model.graph.outputs]
    if any(name.startswith("present") for name in names):
        first = dict(zip(names, run(model, feeds(0, 4, {})), strict=True))
        cache = {
            name.replace("present", "past_key_values"): first[name] for name in names if name.startswith("present")
        }
        found.append(run(model, feeds(4, 5, cache))[0])
    return found


def test_smoothing_changes_nothing_but_makes_int8_better(graph: Graph, run: Run, rng: np.random.Generator) -> None:
    body = "n = LayerNormalization(x, gain, beta)  h = MatMul(n, a)  r = Relu(h)  y = MatMul(r, d)  z = MatMul(n, b)"
    plain = mlp(graph, body, rng)
    gain = np.array(plain.graph.initializers["gain"].const_value)
    gain[5] = 60  # an outlier channel
    plain.graph.initializers["gain"].const_value = ir.tensor(gain, name="gain")
    x = {"x": rng.standard_normal((4, 50, 64), dtype=np.float32)}  # no channel stays silent
    expected, _ = run(plain, x)
    smoothed = plain.clone()
    optimizer = Smooth(sites=("norm", "up"))
    context = Context(Calibration([x]))
    assert optimizer.run(smoothed, context).report.matched == {
        "norm and its products": 1,
        "product and those that it feeds": 1,
    }
    np.testing.assert_allclose(run(smoothed, x)[0], expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())
    again = smoothed.clone()
    optimizer.run(again, context)
    for name in ("a", "b", "d", "gain"):  # smoothed activations and weights have nothing left to trade
        once, twice = (np.array(model.graph.initializers[name].const_value) for model in (smoothed, again))
        np.testing.assert_allclose(twice, once, rtol=1e-4)
    errors = []
    for model in (plain, smoothed):
        QuantizeDynamic("uint8")(model)
        errors.append(np.linalg.norm(run(model, x)[0] - expected))
    assert errors[1] < errors[0] / 2


def test_a_node_takes_what_nothing_else_does(graph: Graph, check: Callable[..., Any], rng: np.random.Generator) -> None:
    """Where a norm feeds a residual, and behind Gelu; a second time these are gains like any other."""
    body = "n = LayerNormalization(x, gain, beta)  h = MatMul(n, a)  r = Gelu(h)  y = MatMul(r, d)  z = Sigmoid(n)"
    model = mlp(graph, body, rng)
    x = {"x": rng.standard_normal((4, 50, 64), dtype=np.float32)}
    optimizer = Smooth(sites=("node",))
    context = Context(Calibration([x]))
    found = check(
        partial(optimizer.run, context=context),
        model,
        x,
        golden="""
        n = LayerNormalization(x, gain, beta)
        n.factors.output = Mul(n, n.factors)
        h = MatMul(n.factors.output, a)
        r = Gelu(h)
        r.factors.output = Mul(r, r.factors)
        y = MatMul(r.factors.output, d)
        z = Sigmoid(n)
        """,
        tolerance=1e-3,
        relative=1e-4,
    )
    assert found.result.report.matched == {"product with factors of its own": 2}
    assert [site.kind for site in sites(found.model)[0]] == ["norm", "norm"]


def test_smoothing_without_samples(graph: Graph, rng: np.random.Generator) -> None:
    model = mlp(graph, EXACT["relu"][0], rng)
    assert not Smooth()(model).report.matched  # type: ignore[attr-defined]
    assert Smooth(sites=("up",))(model).report.skipped["no sample inputs for this graph"] == 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="strength"):
        Smooth(2)


CHAIN = """g (float[M, 32] x, float[32, 32] a, float[32] c, float[32, 32] b, float[32, 32] d, float[32, 16] e)
    => (float[M, 16] y) { h = Gemm(x, a, c)  i = Relu(h)  j = MatMul(i, b)  k = Relu(j)  l = MatMul(k, d)
        y = MatMul(l, e) }"""


def test_equalized_weights_reach_equally_far(graph: Graph, check: Callable[..., Any], rng: np.random.Generator) -> None:
    """Weights between two others included; nothing is left to do then."""
    arrays = weights(CHAIN, rng)
    for name in "abde":
        arrays[name] *= np.exp(rng.uniform(-3, 3, arrays[name].shape[1])).astype(np.float32)
    x = {"x": rng.standard_normal((7, 32), dtype=np.float32)}
    found = check(Equalize(), graph(CHAIN, **arrays), x, tolerance=0.1, relative=1e-4)
    assert found.result.report.matched == {"product and those that it feeds": 3}
    matrices = {name: np.array(found.model.graph.initializers[name].const_value) for name in "abde"}
    for first, second in ("ab", "bd", "de"):
        ratio = np.abs(matrices[first]).max(axis=0) / np.abs(matrices[second]).max(axis=1)
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=5e-3)  # relative to each other: SETTLED, and its square
