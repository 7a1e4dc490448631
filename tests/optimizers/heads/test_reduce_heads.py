"""reduce-heads on exported graphs: what transformers computes with the reduced weights, exactness, and refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.arrays import Array
from onnxpress.artifact.artifact import Source
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.io import copy_graph
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.heads.maths.attention_weights import AttentionWeights
from onnxpress.optimizers.heads.reduce_heads import ReduceHeads
from onnxpress.optimizers.heads.sites import HeadSite, pack_weights, site_of

Run = Callable[..., list[Array]]
Exported = Callable[..., ir.Model]
Tiny = Callable[..., ir.Model]
Change = Callable[[AttentionWeights], AttentionWeights]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny("llama", head_dim=32)`: a graph of our exporter with a config of one's own, exported once."""
    from onnxpress.exporter import architectures
    from onnxpress.exporter.export import export
    from onnxpress.exporter.sources.checkpoint import load_folder

    known: dict[str, ir.Model] = {}

    def graph(name: str, **changes: Any) -> ir.Model:
        key = f"{name} {sorted(changes.items())}"
        if key not in known:
            folder = tmp_path_factory.mktemp(name)
            architectures.tiny_model(name, folder, **changes)
            task = architectures.catalog()[name]["task"]
            source = load_folder(folder, Source(name, "huggingface-folder"))
            known[key] = export(source, task=task, remember=False).graphs["model"]
        return copy_graph(known[key])

    return graph


def sites(model: ir.Model) -> list[HeadSite]:
    return [site_of(block, block.attentions[0]) for block in anatomy_of(model).blocks]


def change_weights(model: ir.Model, change: Change) -> None:
    for site in sites(model):
        changed = {name: ir.tensor(array) for name, array in pack_weights(site, change(site.read())).items()}
        site.write(changed)


def texts(model: ir.Model, count: int = 6, rows: int = 2, length: int = 24) -> list[dict[str, Array]]:
    rng = np.random.default_rng(3)
    given = [feeds(model, rng.integers(3, 100, (rows, length))) for _ in range(count)]
    return [{name: array for name, array in sample.items() if array.size} for sample in given]  # no cache yet


def feeds(model: ir.Model, ids: Array, padding: int = 0, past: dict[str, Array] | None = None) -> dict[str, Array]:
    """All inputs of a graph; `padding` tokens of the first row, on the left for decoders, on the right for encoders."""
    length = ids.shape[1] + (next(iter(past.values())).shape[2] if past else 0)
    mask = np.ones((len(ids), length), np.int64)
    caches = [value for value in model.graph.inputs if str(value.name).startswith("past")]
    mask[0, slice(0, padding) if caches else slice(length - padding, length)] = 0
    given: dict[str, Array] = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    for value in caches:
        assert value.shape is not None
        name, shape = str(value.name), [int(value.shape[1]), 0, int(value.shape[3])]
        given[name] = past[name] if past else np.zeros((len(ids), *shape), np.float32)
    return {name: array for name, array in given.items() if any(value.name == name for value in model.graph.inputs)}


def reduce(model: ir.Model, samples: Any = None, **options: Any) -> Report:
    optimizer = ReduceHeads(**options)
    context = Context(Calibration(texts(model) if samples is None else samples))
    return optimizer.run(model, context).report


def assert_same(run: Run, found: ir.Model, expected: ir.Model, tolerance: float) -> None:
    """Prefill, a padded batch and, for decoders, one more token with the cache."""
    ids = np.random.default_rng(8).integers(3, 100, (2, 9))
    for padding in (0, 3):
        ours, theirs = (run(model, feeds(model, ids, padding)) for model in (found, expected))
        real = np.ones((2, 9), bool)
        decoder = len(ours) > 1
        real[0, slice(0, padding) if decoder else slice(9 - padding, 9)] = False
        np.testing.assert_allclose(ours[0][real], theirs[0][real], atol=tolerance, rtol=0)
        if not decoder:
            continue
        more = []
        for model, outputs in ((found, ours), (expected, theirs)):
            names = [str(value.name).replace("present", "past_key_values") for value in model.graph.outputs[1:]]
            past = dict(zip(names, outputs[1:], strict=True))
            given = feeds(model, ids[:, :1], padding, past)
            shapes = {value.name: value.shape for value in model.graph.inputs}
            assert all(shapes[name][1] == array.shape[1] for name, array in past.items())  # type: ignore[index]
            more.append(run(model, given)[0])
        np.testing.assert_allclose(more[0], more[1], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"kv_heads": 1},
        {"heads": 4, "kv_heads": 1},
        {"heads": 2, "method": "slice"},
        {"heads": 2, "kv_heads": 1, "method": "resample"},
        {"heads": 2, "kv_heads": 1, "method": "resample", "matrix": "random", "refit": True},
    ],
)
def test_transformers_computes_the_same_with_the_reduced_weights(tiny: Tiny, run: Run, options: Any) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from onnxpress.exporter.architectures import tiny_config

    model = tiny("llama")
    report = reduce(model, **options)
    assert sum(report.matched.values()) == len(sites(model))
    heads, kv_heads, head_dim = sites(model)[0].sizes
    assert (heads, kv_heads) == (options.get("heads", 2), options.get("kv_heads", 2))
    config = tiny_config("llama", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    oracle = LlamaForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    state = oracle.state_dict()
    for name, parameter in state.items():
        stored = weights.get(name, weights["model.embed_tokens.weight"])
        turned = stored.T if tuple(stored.shape) != tuple(parameter.shape) or name.endswith("o_proj.weight") else stored
        is_projection = name.endswith("_proj.weight")
        parameter.copy_(torch.from_numpy(np.array(stored.T if is_projection else turned)))
    ids = np.random.default_rng(8).integers(3, 100, (2, 9))
    for padding in (0, 3):
        given = feeds(model, ids, padding)
        with torch.no_grad():
            expected = oracle(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(given["attention_mask"]),
                position_ids=torch.from_numpy(np.maximum(given["attention_mask"].cumsum(1) - 1, 0)),
            ).logits.numpy()
        real = given["attention_mask"].astype(bool)
        found = run(model, given)
        np.testing.assert_allclose(found[0][real], expected[real], atol=2e-4)
        whole = run(model, feeds(model, np.hstack([ids, ids[:, :1]]), padding))
        names = [str(value.name).replace("present", "past_key_values") for value in model.graph.outputs[1:]]
        step = run(model, feeds(model, ids[:, :1], padding, dict(zip(names, found[1:], strict=True))))
        np.testing.assert_allclose(step[0][:, -1], whole[0][:, -1], atol=2e-4)


@pytest.mark.parametrize("method", ["least-squares", "slice"])
@pytest.mark.parametrize(("name", "silent"), [("llama", [1, 2]), ("bert", [0, 2])])
def test_silent_heads_go_and_nothing_changes(tiny: Tiny, run: Run, name: str, silent: list[int], method: Any) -> None:
    model = tiny(name)

    def silence(weights: AttentionWeights) -> AttentionWeights:
        weights.output[silent] = 0
        return weights

    change_weights(model, silence)
    reduced = copy_graph(model)
    report = reduce(reduced, heads=2, method=method)
    assert max(report.errors.values()) < 1e-6
    assert sites(reduced)[0].sizes[0] == 2
    assert_same(run, reduced, model, 1e-4)


def low_rank(rng: np.random.Generator, heads: int, size: int, rank: int) -> Array:
    thin = np.linalg.qr(rng.standard_normal((heads, size, rank)))[0]
    return np.asarray(thin @ thin.transpose(0, 2, 1))


def test_smaller_heads_of_low_rank_lose_nothing_without_rotary_positions(
    tiny: Tiny, run: Run, rng: np.random.Generator
) -> None:
    model = tiny("bert")
    eye = np.repeat(np.eye(16)[None], 4, axis=0)
    change_weights(
        model,
        lambda weights: weights.map_values(low_rank(rng, 4, 16, 8), eye).map_scores(eye, low_rank(rng, 4, 16, 8)),
    )
    reduced = copy_graph(model)
    reduce(reduced, head_dim=8)
    assert sites(reduced)[0].sizes == (4, 4, 8)
    assert_same(run, reduced, model, 1e-3)


def test_smaller_heads_with_rotary_positions_drop_silent_planes(tiny: Tiny, run: Run, rng: np.random.Generator) -> None:
    """One choice of planes for the model, with columns of the tables to match; the scale of scores stays."""
    model = tiny("llama", head_dim=32)
    silent = [1, 2, 5, 8, 9, 11, 14, 15]

    def prepare(weights: AttentionWeights) -> AttentionWeights:
        weights.query[..., silent + [plane + 16 for plane in silent]] = 0
        eye = np.repeat(np.eye(32)[None], weights.kv_heads, axis=0)
        return weights.map_values(low_rank(rng, weights.kv_heads, 32, 16), eye)

    change_weights(model, prepare)
    reduced = copy_graph(model)
    reduce(reduced, head_dim=16)
    (site, *_) = sites(reduced)
    assert site.sizes == (4, 2, 16)
    assert site.attention.node.attributes["scale"].value == pytest.approx(32**-0.5)
    assert site.attention.rotary is not None
    cos = site.attention.rotary[0].const_value
    old = sites(model)[0].attention.rotary[0].const_value  # type: ignore[index]
    kept = [plane for plane in range(16) if plane not in silent]
    np.testing.assert_array_equal(cos.numpy(), old.numpy()[:, kept])  # type: ignore[union-attr]
    assert [name for name in reduced.graph.initializers if "cache" in name] == [
        "rotary_cos_cache.planes8",
        "rotary_sin_cache.planes8",
    ]
    assert_same(run, reduced, model, 1e-3)


def test_resampling_narrows_rotary_heads_by_planes(tiny: Tiny, run: Run) -> None:
    model = tiny("llama", head_dim=32)
    report = reduce(model, samples=(), heads=2, kv_heads=1, head_dim=16, method="resample")
    assert sites(model)[0].sizes == (2, 1, 16)
    assert report.matched == {"4/2 heads × 32 → 2/1 heads × 16": len(sites(model))}
    assert np.isfinite(run(model, feeds(model, np.array([[4, 5, 6]])))[0]).all()


@pytest.mark.parametrize(("heads", "head_dim"), [(32, 16), (16, 32)])
def test_the_sizes_of_the_founding_example(tiny: Tiny, run: Run, heads: int, head_dim: int) -> None:
    """As 32 heads × 128 and 128 × 32, both to 8 × 32, in small; and again there is nothing to do."""
    model = tiny("llama", num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim)
    target = {"heads": 4, "head_dim": 16}
    reduce(model, samples=(), method="resample", **target)
    assert sites(model)[0].sizes == (4, 4, 16)
    assert run(model, feeds(model, np.array([[4, 5, 6]])))[1].shape == (1, 4, 3, 16)
    again = reduce(model, method="resample", **target)
    assert not again.matched


def test_turned_key_value_heads_merge_exactly(tiny: Tiny, run: Run, rng: np.random.Generator) -> None:
    """Multi-head to grouped: heads 0 and 3, 1 and 2 are copies, keys turned plane by plane, values freely."""
    model = tiny("llama", num_key_value_heads=4)

    def prepare(weights: AttentionWeights) -> AttentionWeights:
        order = [0, 1, 1, 0]
        weights = AttentionWeights(
            weights.query, weights.key[:, order], weights.value[:, order], weights.output, weights.offset
        )
        turns = np.linalg.qr(rng.standard_normal((4, 16, 16)))[0]
        weights = weights.map_values(turns, turns.transpose(0, 2, 1))
        maps = np.zeros((4, 16, 16))
        for head in range(4):
            for plane, angle in enumerate(rng.uniform(0, 6, 8)):
                cos, sin = np.cos(angle), np.sin(angle)
                maps[head][np.ix_([plane, plane + 8], [plane, plane + 8])] = [[cos, sin], [-sin, cos]]
        return weights.map_scores(maps, maps)

    change_weights(model, prepare)
    reduced = copy_graph(model)
    report = reduce(reduced, kv_heads=2)
    assert report.matched == {"4/4 heads × 16 → 4/2 heads × 16": len(sites(model))}
    assert_same(run, reduced, model, 1e-3)


def test_regress_does_the_work_of_heads_that_attend_alike(tiny: Tiny, run: Run, rng: np.random.Generator) -> None:
    model = tiny("bert")
    eye = np.repeat(np.eye(16)[None], 4, axis=0)

    def prepare(weights: AttentionWeights) -> AttentionWeights:
        weights.query[:, 2:], weights.key[:, 2:] = weights.query[:, :2], weights.key[:, :2]
        return weights.map_values(low_rank(rng, 4, 16, 8), eye)

    change_weights(model, prepare)
    errors = {}
    for method in ("least-squares", "regress"):
        reduced = copy_graph(model)
        report = reduce(reduced, texts(model, 12, 4), heads=2, method=method)
        errors[method] = max(report.errors.values())
    assert_same(run, reduced, model, 2e-3)
    assert errors["regress"] < 1e-6 < errors["least-squares"] / 100, errors


def test_regress_does_the_work_of_a_group_that_attends_alike(tiny: Tiny, run: Run, rng: np.random.Generator) -> None:
    """Queries of the second group are copies of the first's, and so are its keys; values of both fit into one."""
    model = tiny("llama")
    eye = np.repeat(np.eye(16)[None], 2, axis=0)

    def prepare(weights: AttentionWeights) -> AttentionWeights:
        weights.query[:, 2:], weights.key[:, 1] = weights.query[:, :2], weights.key[:, 0]
        return weights.map_values(low_rank(rng, 2, 16, 8), eye)

    change_weights(model, prepare)
    errors = {}
    for method in ("least-squares", "regress"):
        reduced = copy_graph(model)
        report = reduce(reduced, texts(model, 12, 4), kv_heads=1, method=method, first_tokens=0.0)
        errors[method] = max(report.errors.values())
    assert sites(reduced)[0].sizes == (2, 1, 16)
    assert_same(run, reduced, model, 2e-3)
    assert errors["regress"] < 1e-5 < errors["least-squares"] / 100, errors


def test_each_method_loses_less_than_the_one_before(tiny: Tiny) -> None:
    """Output errors of the first layer of random weights, on the samples that they were fitted to."""
    model = tiny("bert")
    samples, errors = texts(model, 24, 4), []
    for options in ({"method": "slice"}, {"method": "slice", "refit": True}, {}, {"method": "regress"}):
        report = reduce(copy_graph(model), samples, heads=2, **options)
        errors.append(next(iter(report.errors.values())))
    assert errors[3] < errors[2] <= errors[1] < errors[0]


def test_texts_of_one_token_lose_less_where_first_tokens_count(tiny: Tiny, run: Run) -> None:
    model = tiny("llama")
    lost = []
    for share in (0.0, 0.1):
        reduced = copy_graph(model)
        reduce(reduced, heads=2, first_tokens=share)
        given = feeds(model, np.arange(3, 67)[:, None])
        lost.append(float(np.square(run(reduced, given)[0] - run(model, given)[0]).mean()))
    assert lost[1] < lost[0] / 1.5, lost


def test_an_encoder_has_no_first_tokens(tiny: Tiny) -> None:
    found = []
    for share in (0.0, 0.5):
        model = tiny("bert")
        reduce(model, heads=2, first_tokens=share)
        found.append([site.read().output for site in sites(model)])
    np.testing.assert_array_equal(*found)


def test_matrices_of_a_file(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("bert")
    path = tmp_path / "matrices.npz"
    np.savez(path, heads=[[2.0, 0], [2, 0], [0, 5], [0, 5]])
    other = copy_graph(model)
    reduce(model, (), heads=2, method="resample", matrix=str(path))
    reduce(other, (), heads=2, method="resample")
    for one, two in zip(sites(model), sites(other), strict=True):
        np.testing.assert_allclose(one.read().output, two.read().output)
    with pytest.raises(UsageError, match=r"heads must be a matrix \[4, 1\], not \[4, 2\]"):
        reduce(tiny("bert"), (), heads=1, method="resample", matrix=str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        reduce(tiny("bert"), (), heads=1, method="resample", matrix=str(tmp_path / "none.npz"))


def test_some_layers_only_and_what_remains_of_a_probe(tiny: Tiny, run: Run) -> None:
    model = tiny("llama")
    nodes, weights = len(model.graph), set(model.graph.initializers)
    report = reduce(model, heads=2, include=["model.layers.1.*"])
    assert [site.sizes[0] for site in sites(model)][:3] == [4, 2, 4]
    assert sum(report.matched.values()) == 1
    assert any("only ONNX can express" in reason for reason in report.skipped)
    assert len(model.graph) == nodes
    assert set(model.graph.initializers) == weights
    assert np.isfinite(run(model, feeds(model, np.array([[4, 5, 6]])))[0]).all()


def test_an_interrupted_run_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = tiny("llama")
        optimizer = ReduceHeads(heads=2)
        steps: list[tuple[int, int]] = []
        context = Context(
            Calibration(texts(model), tmp_path, progress=lambda done, whole, steps=steps: steps.append((done, whole)))
        )
        optimizer.run(model, context)
        found.append([site.read() for site in sites(model)])
    assert not steps, "the second run computes nothing again"
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one.output, two.output)
        np.testing.assert_array_equal(one.query, two.query)


@pytest.mark.parametrize("method", ["least-squares", "resample"])
@pytest.mark.parametrize(
    ("options", "numbers"),
    [({"ratio": 0.5}, {"heads": 2}), ({"kv_ratio": 0.5}, {"kv_heads": 1})],
)
def test_a_share_of_the_heads_is_as_many_heads(tiny: Tiny, options: Any, numbers: Any, method: Any) -> None:
    found = []
    for asked in (options, numbers):
        model = tiny("llama")
        report = reduce(model, method=method, include=["model.layers.1.*"], **asked)
        assert sum(report.matched.values()) == 1
        found.append(sites(model)[1])
    one, two = found
    assert one.sizes == two.sizes != (4, 2, 16)
    np.testing.assert_array_equal(one.read().query, two.read().query)
    np.testing.assert_array_equal(one.read().output, two.read().output)


def test_nothing_to_do(tiny: Tiny) -> None:
    for options in ({"heads": 4}, {"ratio": 0.9}, {"kv_ratio": 1.0}):
        report = reduce(tiny("llama"), **options)
        assert not report.matched
        assert report.skipped["no more and no larger heads than wanted"] > 0
    report = reduce(tiny("llama"), (), heads=2)
    assert report.skipped["no sample inputs for this graph"] > 0
    with pytest.raises(UsageError, match="say how many heads"):
        ReduceHeads()
    with pytest.raises(UsageError, match="first_tokens is a share"):
        ReduceHeads(heads=2, first_tokens=1.0)


def test_an_encoder_decoder_is_cut_in_its_encoder(exported: Exported, run: Run) -> None:
    encoder, decoder = exported("bart", "encoder_model"), exported("bart", "decoder_model")
    reduce(encoder, heads=2)
    assert sites(encoder)[0].sizes == (2, 2, 16)
    report = reduce(decoder, (), heads=2)
    assert not report.matched
    assert {reason.split(":")[0] for reason in report.skipped} == {
        "cross-attention",
        "keys and values are read by more than the attention",
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen3", {"heads": 2}, r"QK-norm"),
        ("llama", {"head_dim": 8}, r"head_dim must be a multiple of 16 where GroupQueryAttention has rotary"),
        ("llama", {"heads": 3}, r"layers.0: 3 query heads cannot share 2 key/value heads evenly"),
        ("llama", {"heads": 4, "kv_heads": 1, "method": "regress"}, r"regress cannot merge"),
        ("bert", {"kv_heads": 2}, r"MultiHeadAttention wants as many key/value heads as heads; 2 and 4"),
    ],
)
def test_refusals(tiny: Tiny, name: str, options: Any, message: str) -> None:
    model = tiny(name)
    before = {key: value.const_value for key, value in model.graph.initializers.items()}
    with pytest.raises((UsageError, UnsupportedModelError), match=message):
        reduce(model, **options)
    assert {key: value.const_value for key, value in model.graph.initializers.items()} == before


def test_a_regression_beyond_the_memory_is_refused(tiny: Tiny) -> None:
    model = tiny("bert")
    optimizer = ReduceHeads(heads=2, method="regress")
    context = Context(Calibration(texts(model), memory_bytes=1 << 16))
    with pytest.raises(UnsupportedModelError, match=r"what 2 heads attend to takes .* GB, more than"):
        optimizer.run(model, context)


def test_position_biases_of_each_head_are_refused(exported: Exported) -> None:
    with pytest.raises(UnsupportedModelError, match="not known to be the same for all heads"):
        reduce(exported("t5", "encoder_model"), (), heads=2)


def test_attention_that_is_spelled_out_is_refused(graph: Callable[..., ir.Model], rng: np.random.Generator) -> None:
    text = """g (float[1, 4, 8] x, float[8, 8] h__0__q, float[8, 8] h__0__k, float[8, 8] h__0__v, float[8, 8] h__0__o,
        float[8, 8] h__1__q, float[8, 8] h__1__k, float[8, 8] h__1__v, float[8, 8] h__1__o) => (float[1, 4, 8] y) {
        q0 = MatMul(x, h__0__q)  k0 = MatMul(x, h__0__k)  v0 = MatMul(x, h__0__v)  t0 = Transpose<perm = [0, 2, 1]>(k0)
        s0 = MatMul(q0, t0)  p0 = Softmax(s0)  c0 = MatMul(p0, v0)  o0 = MatMul(c0, h__0__o)  r0 = Add(x, o0)
        q1 = MatMul(r0, h__1__q)  k1 = MatMul(r0, h__1__k)  v1 = MatMul(r0, h__1__v)
        t1 = Transpose<perm = [0, 2, 1]>(k1)  s1 = MatMul(q1, t1)  p1 = Softmax(s1)  c1 = MatMul(p1, v1)
        o1 = MatMul(c1, h__1__o)  y = Add(r0, o1) }"""
    names = [f"h__{layer}__{name}" for layer in range(2) for name in "qkvo"]
    model = graph(text, **{name: rng.standard_normal((8, 8), dtype=np.float32) for name in names})
    with pytest.raises(UnsupportedModelError, match="spelled out as Softmax"):
        reduce(model, (), heads=2)


def test_a_cache_of_several_graphs_is_refused(exported: Callable[..., ir.Model]) -> None:
    """As optimum writes encoder-decoders: who else reads or writes it would not follow."""
    model = copy_graph(exported("llama"))
    for value in model.graph.inputs:
        value.name = re.sub(r"^(past_key_values\.\d+)\.", r"\1.decoder.", str(value.name))
    with pytest.raises(UnsupportedModelError, match=r"past_key_values\.0\.decoder\.key is one of several graphs"):
        reduce(model, (), heads=2)
