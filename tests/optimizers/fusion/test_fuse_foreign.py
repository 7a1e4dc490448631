"""Graphs as torch's two exporters write them, and small ones written by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

from onnxpress.graph.io import load_graph, save_graph
from onnxpress.graph.report import Report
from onnxpress.graph.tensors import FileTensor
from onnxpress.optimizers.fusion.clean_up import CleanUp
from onnxpress.optimizers.fusion.fuse_attention import fuse_attention
from onnxpress.optimizers.fusion.fuse_foreign import FuseForeign
from onnxpress.optimizers.fusion.fuse_norm import fuse_norms
from onnxpress.optimizers.fusion.fuse_rotary import fuse_rotary

MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
FEEDS = {"input_ids": np.arange(14).reshape(2, 7), "attention_mask": MASK}
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports a tiny model: family, attention implementation, exporter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    class Wrapper(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            cached = {"use_cache": False} if self.model.config.model_type == "llama" else {}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **cached)[0]

    def export(family: str, attention: str, dynamo: bool) -> ir.Model:
        torch.manual_seed(0)
        if family == "llama":
            config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=attention)
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.BertConfig(**SIZES, attn_implementation=attention)
            model = transformers.BertModel(config, add_pooling_layer=False)
        path = tmp_path_factory.mktemp(family) / "model.onnx"
        inputs = (torch.randint(0, 90, (2, 7)), torch.ones(2, 7, dtype=torch.int64))
        names = {"input_names": list(FEEDS), "output_names": ["out"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if dynamo:
                batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
                shapes = ({0: batch, 1: length},) * 2
                torch.onnx.export(
                    Wrapper(model.eval()), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, **names
                ).save(path)
            else:
                axes = {name: {0: "batch_size", 1: "sequence_length"} for name in FEEDS}
                torch.onnx.export(Wrapper(model.eval()), inputs, path, dynamo=False, dynamic_axes=axes, **names)
        return load_graph(path)

    return export


def check_export(model: ir.Model, run: Any) -> tuple[Report, ir.Model]:
    want = run(model, FEEDS)[0]
    result = FuseForeign()(model)
    visible = MASK.astype(bool)
    np.testing.assert_allclose(run(model, FEEDS)[0][visible], want[visible], atol=1e-5)
    return result.report, model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_from_the_older_exporter(exported: Any, run: Any, attention: str) -> None:
    report, model = check_export(exported("bert", attention, dynamo=False), run)
    assert report.matched == {"MultiHeadAttention": 2, "names of weights": 12}
    assert not report.skipped
    assert "Softmax" not in {node.op_type for node in model.graph}
    bias = next(node for node in model.graph if node.op_type == "MultiHeadAttention").inputs[5]
    assert bias is not None
    assert bias.shape is not None
    assert bias.shape[1] == 1  # which lets heads be taken out, however the mask is computed


@pytest.mark.slow
def test_bert_agrees_with_the_optimizer_of_onnxruntime(exported: Any, run: Any, tmp_path: Path) -> None:
    """As many attentions and activations as onnxruntime.transformers finds in the same graph, and the same numbers."""
    from onnxruntime.transformers.optimizer import optimize_model

    model = exported("bert", "eager", dynamo=True)
    save_graph(model, tmp_path / "m.onnx", external_data="m.data")
    theirs = optimize_model(str(tmp_path / "m.onnx"), model_type="bert", num_heads=4, hidden_size=32)
    counts = theirs.get_fused_operator_statistics()
    report, _ = check_export(model, run)
    assert report.matched["MultiHeadAttention"] == 2 >= counts["Attention"] + counts["MultiHeadAttention"]


@pytest.mark.slow
def test_llama_from_the_current_exporter(exported: Any, run: Any) -> None:
    report, _ = check_export(exported("llama", "sdpa", dynamo=True), run)
    assert report.matched == {
        "SimplifiedLayerNormalization": 5,
        "RotaryEmbedding": 4,
        "MultiHeadAttention": 2,
        "QuickGelu": 2,
        "names of weights": 15,
    }
    assert not report.skipped


def test_llama_from_the_older_exporter(exported: Any, run: Any) -> None:
    report, _ = check_export(exported("llama", "eager", dynamo=False), run)
    assert report.matched == {
        "SimplifiedLayerNormalization": 5,
        "RotaryEmbedding": 4,
        "GroupQueryAttention": 2,
        "QuickGelu": 2,
        "names of weights": 15,
    }
    assert not report.skipped


def test_a_second_run_finds_nothing(exported: Any, listing: Any) -> None:
    model = exported("bert", "eager", dynamo=False)
    FuseForeign()(model)
    before = listing(model)
    assert not FuseForeign()(model).modified
    assert listing(model) == before


def test_large_weights_are_never_read(exported: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = exported("bert", "sdpa", dynamo=False)
    save_graph(model, tmp_path / "m.onnx", external_data="m.data")
    model = load_graph(tmp_path / "m.onnx")
    monkeypatch.setattr(FileTensor, "read", lambda self, *_: pytest.fail(f"read {self.name}"))
    assert FuseForeign()(model).report.matched["MultiHeadAttention"] == 2


# Normalisations written by hand.

CONSTANTS = "<float two = {2.0}, float one = {1.0}, float eps = {1e-6}, int64[1] last = {-1}, int64[1] first = {0}>"
RMS = {
    "reciprocal": "q = Pow(x, two) m = ReduceMean(q, last) a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r) n = Mul(x, i)"
    " y = Mul(n, g)",
    "one over": "q = Mul(x, x) m = ReduceMean(q, last) a = Add(eps, m) r = Sqrt(a) i = Div(one, r) n = Mul(i, x)"
    " y = Mul(g, n)",
    "division": "q = Mul(x, x) m = ReduceMean(q, last) a = Add(m, eps) r = Sqrt(a) n = Div(x, r) y = Mul(n, g)",
    "casts": "c = Cast<to=1>(x) q = Pow(c, two) m = ReduceMean(q, last) a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r)"
    " n = Mul(c, i) d = Cast<to=1>(n) y = Mul(d, g)",
}
LAYER = (
    "u = ReduceMean(x, last) c = Sub(x, u) q = Pow(c, two) m = ReduceMean(q, last) a = Add(m, eps) r = Sqrt(a)"
    " n = Div(c, r) s = Mul(n, g) y = Add(s, b)"
)


def norm_graph(graph: Any, body: str, rng: np.random.Generator) -> ir.Model:
    model: ir.Model = graph(
        f"g (float[B, 3, 8] x, float[8] g, float[8] b) => (float[B, 3, 8] y) {CONSTANTS} {{ {body} }}",
        g=rng.standard_normal(8, dtype=np.float32),
        b=rng.standard_normal(8, dtype=np.float32),
    )
    for node in model.graph:
        for value in node.outputs:
            value.dtype = ir.DataType.FLOAT
    return model


@pytest.mark.parametrize("form", RMS)
def test_rms_norm(graph: Any, run: Any, listing: Any, rng: np.random.Generator, form: str) -> None:
    model, feeds = norm_graph(graph, RMS[form], rng), {"x": rng.standard_normal((2, 3, 8), dtype=np.float32)}
    want = run(model, feeds)[0]
    fuse_norms(model, report := Report())
    CleanUp()(model)
    assert report.matched == {"SimplifiedLayerNormalization": 1}
    assert listing(model) == "y = SimplifiedLayerNormalization[axis=-1, epsilon=1e-06, stash_type=1](x, g)"
    np.testing.assert_allclose(run(model, feeds)[0], want, atol=1e-5)


def test_layer_norm(graph: Any, run: Any, listing: Any, rng: np.random.Generator) -> None:
    model, feeds = norm_graph(graph, LAYER, rng), {"x": rng.standard_normal((2, 3, 8), dtype=np.float32)}
    want = run(model, feeds)[0]
    fuse_norms(model, report := Report())
    CleanUp()(model)
    assert report.matched == {"LayerNormalization": 1}
    assert listing(model) == "y = LayerNormalization[axis=-1, epsilon=1e-06, stash_type=1](x, g, b)"
    np.testing.assert_allclose(run(model, feeds)[0], want, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        RMS["division"].replace("last", "first"),
        RMS["reciprocal"].replace("two", "one"),
        RMS["one over"].replace("Div(one", "Div(two"),
        RMS["division"].replace("Mul(n, g)", "Add(n, g)"),
    ],
)
def test_norm_near_misses(graph: Any, rng: np.random.Generator, body: str) -> None:
    fuse_norms(norm_graph(graph, body, rng), report := Report())
    assert not report.matched


# Attention written by hand.

ATTENTION = """
    q4 = Reshape(q, heads) k4 = Reshape(k, heads) v4 = Reshape(v, heads)
    qh = Transpose<perm=[0, 2, 1, 3]>(q4) kt = Transpose<perm=[0, 2, 3, 1]>(k4) vh = Transpose<perm=[0, 2, 1, 3]>(v4)
    raw = MatMul(qh, kt) scaled = Mul(raw, scale) masked = Add(scaled, mask) p = Softmax(masked)
    o = MatMul(p, vh) t = Transpose<perm=[0, 2, 1, 3]>(o) y = Reshape(t, merged)
"""


def attention_graph(graph: Any, body: str = ATTENTION) -> ir.Model:
    model: ir.Model = graph(
        f"""g (float[B, 5, 8] q, float[B, 6, 8] k, float[B, 6, 8] v, float[B, 1, 1, 6] mask) => (float[B, 5, 8] y)
        <int64[4] heads = {{0, 0, 2, 4}}, int64[3] merged = {{0, 0, 8}}, float scale = {{0.3}}> {{ {body} }}"""
    )
    common.ShapeInferencePass()(model)
    return model


@pytest.fixture
def attention_feeds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds = {n: rng.standard_normal((2, s, 8), dtype=np.float32) for n, s in {"q": 5, "k": 6, "v": 6}.items()}
    mask = np.where(rng.random((2, 1, 1, 6)) < 0.3, -1e9, 0).astype(np.float32)
    return {**feeds, "mask": mask}


SCALED = ATTENTION.replace("raw = MatMul(qh, kt)", "qs = Mul(qh, scale) ks = Div(kt, scale) raw = MatMul(qs, ks)")
KEYS = ATTENTION.replace(
    "kt = Transpose<perm=[0, 2, 3, 1]>(k4)",
    "kh = Transpose<perm=[0, 2, 1, 3]>(k4) kt = Transpose<perm=[0, 1, 3, 2]>(kh)",
)
UNMASKED = ATTENTION.replace("masked = Add(scaled, mask) p = Softmax(masked)", "p = Softmax(scaled)")


@pytest.mark.parametrize("body", [ATTENTION, SCALED, KEYS, UNMASKED])
def test_attention(graph: Any, run: Any, attention_feeds: Any, body: str) -> None:
    model = attention_graph(graph, body)
    feeds = attention_feeds
    want = run(model, feeds)[0]
    fuse_attention(model, report := Report())
    CleanUp()(model)
    assert report.matched == {"MultiHeadAttention": 1}
    assert "Softmax" not in {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model, feeds)[0], want, atol=1e-5)


ATTENTION_NEAR_MISSES = {
    "softmax is not over the last axis": ("Softmax(masked)", "Softmax<axis=1>(masked)"),
    "no product of queries and keys before the softmax": ("Softmax(masked)", "Softmax(mask)"),
    "values are not split by Reshape and Transpose, but made by nothing": ("MatMul(p, vh)", "MatMul(p, v)"),
    "values are scaled": ("MatMul(p, vh)", "MatMul(p, vs)"),
    "heads are not merged by Transpose and Reshape": ("Transpose<perm=[0, 2, 1, 3]>(o)", "Identity(o)"),
}


@pytest.mark.parametrize("reason", ATTENTION_NEAR_MISSES)
def test_attention_near_misses(graph: Any, reason: str) -> None:
    old, new = ATTENTION_NEAR_MISSES[reason]
    body = ATTENTION.replace("raw =", "vs = Mul(vh, scale) raw =").replace(old, new)
    model = ir.from_proto(ir.to_proto(attention_graph(graph)))  # shapes of the intact graph
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    text = f"""g (float[B, 5, 8] q, float[B, 6, 8] k, float[B, 6, 8] v, float[B, 1, 1, 6] mask) => (float[B, 5, 8] y)
        <int64[4] heads = {{0, 0, 2, 4}}, int64[3] merged = {{0, 0, 8}}, float scale = {{0.3}}> {{ {body} }}"""
    missed: ir.Model = graph(text)
    for node in missed.graph:
        for value in node.outputs:
            value.shape = value.shape or shapes.get(value.name)
    fuse_attention(missed, report := Report())
    assert not report.matched
    assert report.skipped == {f"attention: {reason}": 1}


# Rotary embeddings written by hand.

ROTARY = """
    f = MatMul(column, frequency) ff = Concat<axis=-1>(f, f)
    c = Cos(ff) s = Sin(ff) cs = Mul(c, scale) ss = Mul(s, scale) cu = Unsqueeze(cs, one) su = Unsqueeze(ss, one)
    x1 = Slice(x, zero, half, last) x2 = Slice(x, half, size, last)
    n = Neg(x2) r = Concat<axis=-1>(n, x1) a = Mul(x, cu) b = Mul(r, su) y = Add(a, b)
"""


def rotary_graph(graph: Any, body: str = ROTARY, batch: str = "B") -> ir.Model:
    model: ir.Model = graph(
        f"""g (float[B, 2, S, 8] x, float[{batch}, S, 1] column, float[1, 4] frequency) => (float[B, 2, S, 8] y)
        <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[1] half = {{4}}, int64[1] size = {{9223372036854775807}},
         int64[1] last = {{3}}, float scale = {{1.25}}> {{ {body} }}""",
        frequency=np.array([[1, 0.3, 0.1, 0.01]], np.float32),
    )
    common.ShapeInferencePass()(model)
    return model


@pytest.mark.parametrize("batch", ["1", "B"])
def test_rotary(graph: Any, run: Any, rng: np.random.Generator, batch: str) -> None:
    """Positions of left-padded rows differ, and each row keeps its own."""
    model = rotary_graph(graph, batch=batch)
    positions = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])[: 1 if batch == "1" else 2]
    feeds = {
        "x": rng.standard_normal((2, 2, 5, 8), dtype=np.float32),
        "column": positions[..., None].astype(np.float32),
    }
    want = run(model, feeds)[0]
    fuse_rotary(model, report := Report())
    CleanUp()(model)
    assert report.matched == {"RotaryEmbedding": 1}
    assert "Slice" not in {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model, feeds)[0], want, atol=1e-5)


ROTARY_NEAR_MISSES = {
    "halves are not constant slices of one value": ("Slice(x, zero, half", "Slice(x, one, half"),
    "cosine and sine are not of the same doubled angles": ("Mul(s, scale)", "Neg(s)"),
    "no product of the same value with the cosine": ("a = Mul(x, cu)", "xx = Abs(x) a = Mul(xx, cu)"),
    "no product with the sine and sum with the other part": ("y = Add(a, b)", "y = Sub(a, b)"),
}


@pytest.mark.parametrize("reason", ROTARY_NEAR_MISSES)
def test_rotary_near_misses(graph: Any, reason: str) -> None:
    fuse_rotary(rotary_graph(graph, ROTARY.replace(*ROTARY_NEAR_MISSES[reason])), report := Report())
    assert not report.matched
    assert report.skipped == {f"rotary embedding: {reason}": 1}


def test_rotary_with_angles_of_an_unknown_batch(graph: Any) -> None:
    fuse_rotary(rotary_graph(graph, batch="N"), report := Report())
    assert report.skipped == {"rotary embedding: batch of the angles is not known": 1}
