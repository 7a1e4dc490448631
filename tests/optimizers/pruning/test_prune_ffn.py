"""prune-ffn: narrower networks that compute what they should, in every architecture; refusals with their reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.arrays import Feeds
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.known_results import KnownResults
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, set_weight
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.fusion.fuse_skip_norm import FuseSkipNorm
from onnxpress.optimizers.pruning.maths import width as maths
from onnxpress.optimizers.pruning.prune_ffn import PruneFfn
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic

Exported = Callable[..., ir.Model]
Run = Callable[..., list[NDArray[Any]]]


def feeds(model: ir.Model, batch: int = 3, length: int = 12, past: int = 0, seed: int = 0) -> Feeds:
    """Random tokens; the last row begins, or ends, with padding where there is no cache."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, past + length), np.int64)
    if not past:
        mask[-1, -4:] = 0
    found: Feeds = {
        "input_ids": rng.integers(3, 60, (batch, length)),
        "attention_mask": mask,
        "position_ids": np.broadcast_to(np.arange(past, past + length), (batch, length)).copy(),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            assert value.shape is not None
            shape = [batch, value.shape[1], past, value.shape[3]]
            found[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    names = {value.name for value in model.graph.inputs}
    return {name: array for name, array in found.items() if name in names}


def samples_of(model: ir.Model, count: int) -> list[Feeds]:
    """Without the cache, which may be left out."""
    found = [feeds(model, seed=100 + i) for i in range(count)]
    return [{name: array for name, array in sample.items() if not name.startswith("past")} for sample in found]


def pruned(model: ir.Model, samples: int = 6, **options: Any) -> tuple[ir.Model, Any]:
    copy = copy_graph(model)
    optimizer = PruneFfn(**{"multiple_of": 1, **options})
    context = Context(Calibration(samples_of(model, samples)))
    return copy, optimizer.run(copy, context).report


def widths(model: ir.Model) -> list[int]:
    return [block.feed_forward.down.features[0] for block in anatomy_of(model).blocks if block.feed_forward]


def kill(model: ir.Model, dead: NDArray[np.int64]) -> None:
    """Give some channels of every network the weight 0 in down."""
    for block in anatomy_of(model).blocks:
        assert block.feed_forward is not None
        weight = read_weight(block.feed_forward.down)
        weight[dead] = 0
        set_weight(block.feed_forward.down, weight)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "phi3", "falcon", "gemma2"])
@pytest.mark.parametrize("fused", [False, True])
def test_channels_that_do_nothing_go_and_the_outputs_stay(exported: Exported, run: Run, name: str, fused: bool) -> None:
    """On a prompt with padding and on a step with a cache; gated, ungated with biases, packed, parallel."""
    model = exported(name)
    if fused:
        FuseSkipNorm()(model)
    count = widths(model)[0]
    kill(model, np.arange(0, count, 4))
    cut, report = pruned(model, ratio=0.75)
    assert report.matched == {f"feed-forward {count} -> {count * 3 // 4}": len(widths(model))}
    assert set(widths(cut)) == {count * 3 // 4}
    assert max(report.errors.values()) < 1e-9
    for given in (feeds(model), feeds(model, length=1, past=5)):
        for found, expected in zip(run(cut, given), run(model, given), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)
        if name == "bert":
            break
    _, again = pruned(cut, width=count * 3 // 4)
    assert not again.matched
    assert again.skipped == {"as narrow already": len(widths(model))}


def test_copies_are_merged(exported: Exported, run: Run) -> None:
    """The second half of the channels computes what the first does; down reads both, with weights of its own."""
    model = exported("llama")
    for block in anatomy_of(model).blocks:
        assert block.feed_forward is not None
        for product in (block.feed_forward.gate, block.feed_forward.up):
            assert product is not None
            weight = read_weight(product)
            half = weight.shape[1] // 2
            weight[:, half:] = weight[:, :half]
            set_weight(product, weight)
    cut, report = pruned(model, ratio=0.5, ridge=1e-6, method="least-squares", samples=20)
    assert max(report.errors.values()) < 1e-9
    np.testing.assert_allclose(run(cut, feeds(model))[0], run(model, feeds(model))[0], atol=2e-4)
    lost, _ = pruned(model, ratio=0.5, refit=False, method="activation", samples=20)
    assert np.abs(run(lost, feeds(model))[0] - run(model, feeds(model))[0]).max() > 1e-2


@pytest.mark.parametrize("method", ["activation", "flap"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_refit_makes_up_for_what_went(exported: Exported, method: Any, name: str) -> None:
    """Of the same channels, more is kept; and least squares chooses those that can be made up for best."""
    model = exported(name)
    first = anatomy_of(model).blocks[0].feed_forward
    assert first is not None

    def lost(**options: Any) -> float:
        # The first network's channels are chosen by the same statistics in each run.
        return float(pruned(model, ratio=0.5, include=[first.down.name], **options)[1].errors[first.down.name])

    fitted = lost(method=method)
    assert fitted < 0.9 * lost(method=method, refit=False)
    assert lost(method="least-squares") < fitted


def test_what_must_not_change_does_not(exported: Exported) -> None:
    model = exported("llama")
    cut, _ = pruned(model, ratio=0.75)
    for name, value in model.graph.initializers.items():
        found = cut.graph.initializers[name].const_value
        assert found is not None
        assert value.const_value is not None
        if "mlp" not in name:
            np.testing.assert_array_equal(found.numpy(), value.const_value.numpy())
    for ours, theirs in zip(
        [*cut.graph.inputs, *cut.graph.outputs], [*model.graph.inputs, *model.graph.outputs], strict=True
    ):
        assert (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)


def test_a_mean_that_goes_into_a_bias(exported: Exported, run: Run) -> None:
    """FLAP gives down a bias where it has none: with channels that are constant nothing is lost."""
    model = exported("llama")
    given = feeds(model, seed=3)
    cut, report = pruned(model, ratio=0.75, method="flap", refit=False)
    assert report.matched
    assert [block.feed_forward.down.bias is not None for block in anatomy_of(cut).blocks if block.feed_forward]
    plain, _ = pruned(model, ratio=0.75, method="flap", refit=False, bias_compensation=False)
    assert all(block.feed_forward.down.bias is None for block in anatomy_of(plain).blocks if block.feed_forward)
    expected = run(model, given)[0]
    assert np.square(run(cut, given)[0] - expected).sum() < np.square(run(plain, given)[0] - expected).sum()


def test_a_global_budget_takes_from_those_that_need_it_least(exported: Exported, run: Run) -> None:
    """Three quarters of the last network's channels do nothing: they go first, and nothing is lost."""
    model = exported("llama")
    count, layers = widths(model)[0], len(widths(model))
    last = anatomy_of(model).blocks[-1].feed_forward
    assert last is not None
    weight = read_weight(last.down)
    weight[: 3 * count // 4] = 0
    set_weight(last.down, weight)
    ratio = 1 - 0.75 / layers
    cut, report = pruned(model, ratio=ratio, allocation="global", multiple_of=8)
    target = round(ratio * count / 8) * 8
    assert sum(widths(cut)) == target * layers
    assert widths(cut)[-1] < target
    uniform, other = pruned(model, ratio=ratio, multiple_of=8)
    assert sum(widths(uniform)) == sum(widths(cut))
    assert sum(report.errors.values()) < sum(other.errors.values())
    assert run(cut, feeds(model))[0].shape == run(model, feeds(model))[0].shape


def test_gradients_choose(exported: Exported, run: Run, tmp_path: Path) -> None:
    """Channels whose weights have no gradient go; a missing gradient, or one of another shape, is refused by name."""
    model = exported("llama")
    count = widths(model)[0]
    given = {}
    for block in anatomy_of(model).blocks:
        assert block.feed_forward is not None
        for product in block.feed_forward.products:
            gradient = np.ones(product.features, np.float32)
            (gradient if product is block.feed_forward.down else gradient.T)[: count // 2] = 0
            given[product.name] = gradient
    np.savez(tmp_path / "gradients.npz", **given)
    cut, report = pruned(model, 0, ratio=0.5, method="taylor", gradients=tmp_path / "gradients.npz", refit=False)
    assert report.matched
    for block, before in zip(anatomy_of(cut).blocks, anatomy_of(model).blocks, strict=True):
        assert block.feed_forward is not None
        assert before.feed_forward is not None
        np.testing.assert_array_equal(
            read_weight(block.feed_forward.down), read_weight(before.feed_forward.down)[count // 2 :]
        )
    name, gradient = given.popitem()
    np.savez(tmp_path / "fewer.npz", **given)
    with pytest.raises(UsageError, match=f"no gradient of {name}"):
        pruned(model, 0, ratio=0.5, method="taylor", gradients=tmp_path / "fewer.npz")
    np.savez(tmp_path / "other.npz", **given, **{name: gradient[1:]})
    with pytest.raises(UsageError, match=f"the gradient of {name} is"):
        pruned(model, 0, ratio=0.5, method="taylor", gradients=tmp_path / "other.npz")
    with pytest.raises(UsageError, match="cannot read gradients"):
        pruned(model, 0, ratio=0.5, method="taylor", gradients=tmp_path / "none.npz")


def test_a_walk_that_goes_on(exported: Exported, tmp_path: Path) -> None:
    """Killed after two layers, the second run gives what one run gives."""
    model = exported("llama")
    expected, _ = pruned(model, ratio=0.75)

    class KilledError(Exception):
        pass

    def kill_at(done: int, _: int) -> None:
        if done == 3:
            raise KilledError

    samples = samples_of(model, 6)
    optimizer = PruneFfn(ratio=0.75, multiple_of=1)
    context = Context(Calibration(samples, tmp_path, progress=kill_at))
    with pytest.raises(KilledError):
        optimizer.run(copy_graph(model), context)
    cut = copy_graph(model)
    optimizer = PruneFfn(ratio=0.75, multiple_of=1)
    context = Context(Calibration(samples, tmp_path))
    optimizer.run(cut, context)
    for name, value in expected.graph.initializers.items():
        found = cut.graph.initializers[name].const_value
        assert found is not None
        assert value.const_value is not None
        np.testing.assert_array_equal(found.numpy(), value.const_value.numpy(), name)


def test_a_network_of_two_graphs_is_pruned_once(exported: Exported) -> None:
    """As in an encoder-decoder's two decoders, which share one file of weights; another weight is another matter."""
    first, second = exported("llama"), exported("llama")
    last = anatomy_of(second).blocks[-1].feed_forward
    assert last is not None
    set_weight(last.down, read_weight(last.down)[::-1].copy())
    optimizer, known = PruneFfn(ratio=0.5, multiple_of=1), KnownResults()
    for model, seeds in ((first, range(6)), (second, range(6, 12))):
        context = Context(Calibration([{**samples_of(model, 12)[seed]} for seed in seeds]), known=known)
        optimizer.run(model, context)
    for one, other in zip(anatomy_of(first).blocks, anatomy_of(second).blocks, strict=True):
        assert one.feed_forward is not None
        assert other.feed_forward is not None
        for ours, theirs in zip(one.feed_forward.products, other.feed_forward.products, strict=True):
            same = bool((read_weight(ours) == read_weight(theirs)).all())
            assert same == (other.feed_forward.down.name != last.down.name)


def test_chosen_layers(exported: Exported) -> None:
    model = exported("llama")
    count = widths(model)[0]
    cut, report = pruned(model, width=count // 2, include=["*.layers.[12].*"], exclude=["*.layers.2.*"])
    assert widths(cut) == [count, count // 2, *[count] * (len(widths(model)) - 2)]
    assert report.skipped == {"excluded by name": len(widths(model)) - 1}


def test_experts_are_left_alone(exported: Exported) -> None:
    _, report = pruned(exported("mixtral"), ratio=0.5)
    assert not report.matched
    assert list(report.skipped) == ["experts in the place of a feed-forward network"]


def test_without_samples_only_what_needs_none(exported: Exported) -> None:
    _, report = pruned(exported("llama"), 0, ratio=0.5)
    assert not report.matched
    assert list(report.skipped) == ["no sample inputs for this graph"]
    _, report = pruned(exported("llama"), 0, ratio=0.5, method="l2", refit=False)
    assert report.matched


def test_quantized_weights_are_refused(exported: Exported) -> None:
    model = exported("llama")
    QuantizeDynamic("uint8", "per_token", min_features=8)(model)
    with pytest.raises(UnsupportedModelError, match="structure comes before quantization"):
        pruned(model, ratio=0.5)


MLP = """g (float[B, S, 8] x, float[8, 16] m__layers__0__up__weight, float[16, 8] m__layers__0__down__weight{extra})
    => (float[B, S, 8] y{out}) {{
        a = MatMul(x, m__layers__0__up__weight)
        b = Tanh(a)
        {middle}
        d = MatMul(c, m__layers__0__down__weight)
        y = Add(x, d) }}"""
OBSTACLES = {
    "Softmax lies between": ("", "", "c = Softmax <axis = -1> (b)"),
    "is read elsewhere": ("", ", float[B, S, 16] c", "c = Identity(b)"),
    "joins the channels": (", float[5, 16] w", "", "c = Mul(b, w)"),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_channels_that_are_more_than_channels(graph: Callable[..., ir.Model], reason: str) -> None:
    extra, out, middle = OBSTACLES[reason]
    weights = {"m__layers__0__up__weight": np.ones((8, 16)), "m__layers__0__down__weight": np.ones((16, 8))}
    if extra:
        weights["w"] = np.ones((5, 16))
    text = MLP.format(extra=extra, out=out, middle=middle)
    model = graph(text, **{name: array.astype(np.float32) for name, array in weights.items()})
    optimizer = PruneFfn(ratio=0.5, multiple_of=1, method="l1", refit=False)
    with pytest.raises(UnsupportedModelError, match=reason):
        optimizer.call(model)


def test_a_factor_for_each_channel_is_cut_with_them(graph: Callable[..., ir.Model], run: Run) -> None:
    rng = np.random.default_rng(0)
    up, down, factor = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 8), (16,)))
    down[::2] = 0
    text = MLP.format(extra=", float[16] w", out="", middle="c = Mul(b, w)")
    model = graph(text, m__layers__0__up__weight=up, m__layers__0__down__weight=down, w=factor)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    (expected,) = run(model, {"x": x})
    PruneFfn(ratio=0.5, multiple_of=1, method="l2", refit=False).call(model)
    np.testing.assert_allclose(run(model, {"x": x})[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "either width"),
        ({"width": 64, "ratio": 0.5}, "either width"),
        ({"ratio": 0.0}, "share of channels"),
        ({"ratio": 75.0}, "share of channels"),
        ({"width": 50, "multiple_of": 32}, "multiple of 32, not 50"),
        ({"ratio": 0.5, "ridge": 0.0}, "ridge must be at least"),
        ({"ratio": 0.5, "multiple_of": 0}, "multiple_of"),
        ({"ratio": 0.5, "method": "taylor"}, "gradients=FILE.npz"),
        ({"ratio": 0.5, "gradients": Path("g.npz")}, "gradients=FILE.npz"),
        ({"ratio": 0.5, "refit": False}, "choose another method"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PruneFfn(**options)


def test_a_ratio_that_leaves_nothing(exported: Exported) -> None:
    with pytest.raises(UsageError, match=r"channels; 0.01 of them are no multiple of 32"):
        pruned(exported("llama"), ratio=0.01, multiple_of=32)


def test_what_was_found_for_one_ratio_serves_another(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a memory, moments are taken once, and removing fewer channels begins like removing more."""
    model = exported("llama")
    seen: list[int] = []
    real = maths.eliminate
    monkeypatch.setattr(maths, "eliminate", lambda *given: (seen.append(given[2]), real(*given))[1])
    plain = {ratio: pruned(model, ratio=ratio, include=["*.1.mlp.*"])[0] for ratio in (0.5, 0.75)}
    seen.clear()
    memory: dict[Any, Any] = {}
    for ratio, expected in plain.items():
        copy = copy_graph(model)
        optimizer = PruneFfn(ratio=ratio, multiple_of=1, include=["*.1.mlp.*"])
        context = Context(Calibration(samples_of(model, 6), memory=memory))
        optimizer.run(copy, context)
        for ours, theirs in zip(anatomy_of(copy).blocks, anatomy_of(expected).blocks, strict=True):
            assert ours.feed_forward is not None
            assert theirs.feed_forward is not None
            for one, other in zip(ours.feed_forward.products, theirs.feed_forward.products, strict=True):
                np.testing.assert_allclose(read_weight(one), read_weight(other), atol=1e-5)
    assert len(seen) == 1
    assert len(memory) == 2, "moments and removals"
