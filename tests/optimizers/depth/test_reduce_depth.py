"""reduce-depth: what is left is a model with fewer layers in every respect, and computes what it should."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.arrays import Array
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, set_bias, set_weight
from onnxpress.graph.conventions import LAYERS, MODULE
from onnxpress.graph.edits import add_constant
from onnxpress.graph.io import copy_graph
from onnxpress.graph.report import Report
from onnxpress.optimizers.depth.compatibility import layer_weights
from onnxpress.optimizers.depth.reduce_depth import ReduceDepth
from onnxpress.optimizers.fusion.fuse_skip_norm import FuseSkipNorm
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks

Exported = Callable[..., ir.Model]
Run = Callable[..., list[Array]]


def names_of(model: ir.Model) -> tuple[list[str], list[str], list[str]]:
    """Inputs, outputs, weights."""
    return (
        [str(value.name) for value in model.graph.inputs],
        [str(value.name) for value in model.graph.outputs],
        sorted(model.graph.initializers),
    )


def feeds_for(model: ir.Model, past: int = 0, padded: bool = False) -> dict[str, Array]:
    """Two rows of tokens after a random cache, the first row padded on the left if wanted."""
    rng = np.random.default_rng(1)
    length = 1 if past else 6
    mask = np.ones((2, past + length), np.int64)
    if padded:
        mask[0, :2] = 0
    feeds: dict[str, Array] = {"input_ids": rng.integers(1, 90, (2, length)), "attention_mask": mask}
    feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    feeds["encoder_attention_mask"] = np.ones((2, 7), np.int64)
    for value in model.graph.inputs:
        name = str(value.name)
        if name == "encoder_hidden_states":
            assert value.shape is not None
            feeds[name] = rng.standard_normal((2, 7, int(value.shape[-1]))).astype(np.float32)  # type: ignore[arg-type]
        elif name.startswith("past_key_values."):
            assert value.shape is not None
            # The same for a layer whatever its number is by now.
            seed = np.random.default_rng(3)
            size = 7 if ".encoder." in name else past
            shape = (2, int(value.shape[1]), size, int(value.shape[3]))  # type: ignore[arg-type]
            feeds[name] = seed.standard_normal(shape).astype(np.float32)
    return {name: array for name, array in feeds.items() if name in {value.name for value in model.graph.inputs}}


def silence(model: ir.Model, index: int) -> None:
    """Let a layer of a pre-norm model add nothing to the hidden states."""
    block = anatomy_of(model).blocks[index]
    assert block.feed_forward is not None
    outputs = [attention.output for attention in block.attentions]
    for product in (*outputs, block.feed_forward.down):
        assert product is not None
        set_weight(product, np.zeros(product.features, np.float32))
        if product.bias is not None:
            set_bias(product, np.zeros(product.features[1]))


def reduced(model: ir.Model, samples: Any = (), **options: Any) -> tuple[ir.Model, Report]:
    copy = copy_graph(model)
    optimizer = ReduceDepth(**options)
    optimizer.calibration = Calibration(samples)
    return copy, optimizer(copy).report  # type: ignore[return-value]


def samples_for(model: ir.Model, rows: int = 4, length: int = 64) -> list[dict[str, Array]]:
    rng = np.random.default_rng(5)
    samples: list[dict[str, Array]] = []
    for _ in range(rows):
        ids = rng.integers(1, 90, (2, length))
        mask = np.ones_like(ids)
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        for value in model.graph.inputs:
            if value.name == "encoder_hidden_states":
                assert value.shape is not None
                states = rng.standard_normal((2, 7, int(value.shape[-1])))  # type: ignore[arg-type]
                feeds |= {
                    str(value.name): states.astype(np.float32),
                    "encoder_attention_mask": np.ones((2, 7), np.int64),
                }
        samples.append(feeds)
    return samples


@pytest.mark.parametrize(("past", "padded"), [(0, False), (5, False), (0, True), (5, True)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layers", [[0], [1, 2], [3]])
def test_a_layer_that_adds_nothing_goes_without_a_trace(
    exported: Exported, run: Run, name: str, layers: list[int], past: int, padded: bool
) -> None:
    whole = exported(name)
    for index in layers:
        silence(whole, index)
    cut, report = reduced(whole, layers=layers)
    assert sum(report.matched.values()) == len(layers)
    expected = dict(zip(names_of(whole)[1], run(whole, feeds_for(whole, past, padded)), strict=True))
    found = dict(zip(names_of(cut)[1], run(cut, feeds_for(cut, past, padded)), strict=True))
    kept = [index for index in range(4) if index not in layers]
    rows = slice(1, None) if padded else slice(None)
    np.testing.assert_allclose(found["logits"][rows], expected["logits"][rows], atol=1e-5)
    assert len(found) == 1 + 2 * len(kept)
    for number, index in enumerate(kept):
        for kind in ("key", "value"):
            np.testing.assert_allclose(
                found[f"present.{number}.{kind}"][rows], expected[f"present.{index}.{kind}"][rows], atol=1e-5
            )


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "modernbert", "gemma3_text"])
def test_names_are_those_of_a_model_with_fewer_layers(exported: Exported, name: str) -> None:
    """Every name of the cut graph is one of the whole graph's first layers; the record tells where they came from."""
    whole = exported(name)
    stack = anatomy_of(whole).blocks[0].title.rpartition(".")[0]
    depth = len(anatomy_of(whole).blocks)
    dropped = [1, depth - 1]
    cut, _ = reduced(whole, layers=dropped)
    assert json.loads(cut.metadata_props[LAYERS]) == {stack: [i for i in range(depth) if i not in dropped]}
    number = re.compile(rf"^(?:{re.escape(stack)}|past_key_values|present)\.(\d+)\.")

    def stays(name: str) -> bool:
        found = number.match(name)
        return found is None or int(found[1]) < depth - 2

    assert names_of(cut) == tuple(list(filter(stays, names)) for names in names_of(whole))
    blocks = anatomy_of(cut).blocks
    assert [block.title for block in blocks] == [f"{stack}.{index}" for index in range(depth - 2)]
    for index, block in enumerate(blocks):
        for node in block.nodes:
            assert node.metadata_props[MODULE].startswith(stack.rpartition(".")[0])
            if node.metadata_props[MODULE].startswith(f"{stack}."):
                assert node.metadata_props[MODULE].split(f"{stack}.")[1].split(".")[0] == str(index)
    again, _ = reduced(cut, layers=[0])
    assert json.loads(again.metadata_props[LAYERS]) == {stack: [i for i in range(depth) if i not in dropped][1:]}


def test_weights_go_where_their_layers_go(exported: Exported) -> None:
    whole = exported("llama")
    cut, _ = reduced(whole, layers=[0, 2])
    for number, index in enumerate([1, 3]):
        ours, theirs = anatomy_of(cut).blocks[number], anatomy_of(whole).blocks[index]
        for one, other in zip(ours.products, theirs.products, strict=True):
            np.testing.assert_array_equal(read_weight(one), read_weight(other))


@pytest.mark.parametrize("stem", ["encoder_model", "decoder_model", "decoder_with_past_model"])
def test_what_a_removed_layer_leaves_to_the_others_survives(exported: Exported, run: Run, stem: str) -> None:
    """T5's first layer computes the position bias of all."""
    whole = exported("t5", stem)
    stack = anatomy_of(whole).blocks[0].title.rpartition(".")[0]
    silence(whole, 0)
    cut, _ = reduced(whole, layers=[0])
    table = next(name for name in whole.graph.initializers if "relative_attention_bias" in name)
    assert table.startswith(f"{stack}.0.")
    assert table in cut.graph.initializers
    past = 5 if "past" in stem else 0
    np.testing.assert_allclose(run(cut, feeds_for(cut, past))[0], run(whole, feeds_for(whole, past))[0], atol=1e-5)
    for kind in ("past_key_values.3", "present.3"):
        assert not [name for part in names_of(cut)[:2] for name in part if name.startswith(kind)]


def test_both_decoders_are_cut_alike_and_the_encoder_is_left_alone(exported: Exported, run: Run) -> None:
    optimizer = ReduceDepth(drop=1, include=["decoder.*"], method="linear", select="loss")
    models = {stem: exported("t5", stem) for stem in ("encoder_model", "decoder_model", "decoder_with_past_model")}
    for stem, model in models.items():
        optimizer.calibration = Calibration(samples_for(model) if stem == "decoder_model" else ())
        report = optimizer(model).report  # type: ignore[union-attr]
        assert bool(report.matched) == stem.startswith("decoder")
    one, other = models["decoder_model"], models["decoder_with_past_model"]
    assert one.metadata_props[LAYERS] == other.metadata_props[LAYERS]
    assert LAYERS not in models["encoder_model"].metadata_props
    for name, value in other.graph.initializers.items():
        if "block" in name:
            theirs = one.graph.initializers[name].const_value
            assert value.const_value is not None
            assert theirs is not None
            np.testing.assert_array_equal(value.const_value.numpy(), theirs.numpy())


def test_a_stack_that_one_decoder_has_no_samples_for_is_cut_in_neither(exported: Exported) -> None:
    optimizer = ReduceDepth(drop=1)
    for stem, rows in (("decoder_with_past_model", 0), ("decoder_model", 4)):
        model = exported("t5", stem)
        optimizer.calibration = Calibration(samples_for(model, rows))
        assert optimizer(model).report.skipped == {"no sample inputs for this graph": 1}  # type: ignore[union-attr]


@pytest.mark.parametrize("select", ["influence", "angular", "loss"])
@pytest.mark.parametrize(("name", "silent"), [("llama", 2), ("gpt2", 1), ("gpt2", 0)])
def test_the_layer_that_does_nothing_is_found(exported: Exported, name: str, silent: int, select: str) -> None:
    whole = exported(name)
    silence(whole, silent)
    cut, report = reduced(whole, samples_for(whole), drop=1, select=select)
    (kept,) = json.loads(cut.metadata_props[LAYERS]).values()
    assert silent not in kept
    assert report.errors[f"{anatomy_of(whole).blocks[silent].title}"] == pytest.approx(0, abs=1e-6)


def test_losses_are_those_of_the_cut_graphs(exported: Exported, run: Run) -> None:
    """Against each graph, cut and run as a whole: greedy takes the least of them each time."""
    whole, samples = exported("llama"), samples_for(exported("llama"), 1, 12)
    _, report = reduced(whole, samples, drop=2, select="loss")

    def loss(dropped: list[int]) -> float:
        cut, _ = reduced(whole, layers=dropped) if dropped else (whole, None)
        logits = [run(model, {**feeds_for(model), **filled(model, samples[0])})[0] for model in (whole, cut)]
        logs = [one - np.log(np.exp(one).sum(-1, keepdims=True)) for one in map(np.float64, logits)]
        return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())

    first = min(range(4), key=lambda index: loss([index]))
    second = min((index for index in range(4) if index != first), key=lambda index: loss(sorted([first, index])))
    expected = {f"model.layers.{first}": loss([first]), f"model.layers.{second}": loss(sorted([first, second]))}
    assert report.errors == pytest.approx(expected, rel=1e-3, abs=1e-9)


def filled(model: ir.Model, sample: Mapping[str, Array]) -> dict[str, Array]:
    names = {value.name for value in model.graph.inputs}
    return {name: array for name, array in sample.items() if name in names}


@pytest.fixture
def pooled(exported: Exported) -> ir.Model:
    """BERT with the mean over tokens behind it, as sentence encoders have: no weight tells it from the last layer."""
    model = exported("bert")
    graph = model.graph
    axes = add_constant(graph, "axes", np.array([1]))
    scaled = ir.node("Mul", [graph.outputs[0], add_constant(graph, "two", np.float32([2]))])
    mean = ir.node("ReduceMean", [scaled.outputs[0], axes], {"keepdims": 0})
    graph.extend([scaled, mean])
    for node, name, sizes in ((scaled, "scaled", ["b", "n", 64]), (mean, "sentence_embedding", ["b", 64])):
        value = node.outputs[0]
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(sizes)
    graph.outputs.append(mean.outputs[0])
    assert mean in anatomy_of(model).blocks[-1].nodes
    return model


def test_pooling_stays_when_the_last_layer_goes(pooled: ir.Model, exported: Exported, run: Run) -> None:
    cut, _ = reduced(pooled, layers=[3])
    states, embedding = run(cut, feeds_for(cut))
    np.testing.assert_allclose(embedding, 2 * states.mean(1), atol=1e-5)
    plain, _ = reduced(exported("bert"), layers=[3])
    np.testing.assert_array_equal(states, run(plain, feeds_for(plain))[0])
    patched, _ = reduced(pooled, samples_for(pooled, 16), layers=[3], method="linear")
    want = run(pooled, feeds_for(pooled))[1]
    assert np.square(run(patched, feeds_for(patched))[1] - want).mean() < np.square(embedding - want).mean()


def test_losses_of_an_encoder_are_those_of_its_states(pooled: ir.Model, run: Run) -> None:
    samples = samples_for(pooled, 1, 12)
    _, report = reduced(pooled, samples, drop=1, select="loss")
    losses = {}
    for index in range(4):
        cut, _ = reduced(pooled, layers=[index])
        found, want = (run(model, samples[0])[0].astype(np.float64) for model in (cut, pooled))
        size = np.linalg.norm(found, axis=-1) * np.linalg.norm(want, axis=-1)
        losses[index] = float((1 - (found * want).sum(-1) / size).mean())
    best = min(losses, key=losses.__getitem__)
    assert report.errors == pytest.approx({f"encoder.layer.{best}": losses[best]}, rel=1e-4)


@pytest.mark.parametrize("method", ["merge", "average"])
@pytest.mark.parametrize("layers", [[1], [1, 2], [0]])
def test_merging_identical_layers_gives_that_layer(exported: Exported, layers: list[int], method: str) -> None:
    whole = exported("llama")
    blocks = anatomy_of(whole).blocks
    for index in (0, 2):
        others = layer_weights(blocks[index])
        for name, value in layer_weights(blocks[1]).items():
            assert value.const_value is not None
            others[name].const_value = ir.tensor(value.const_value.numpy(), name=others[name].name)
    merged, _ = reduced(whole, layers=layers, method=method)
    dropped, _ = reduced(whole, layers=layers)
    for name, value in dropped.graph.initializers.items():
        ours = merged.graph.initializers[name].const_value
        assert value.const_value is not None
        assert ours is not None
        np.testing.assert_array_equal(ours.numpy(), value.const_value.numpy())


@pytest.mark.parametrize(("method", "expected"), [("merge", [-1.0, 1.0, 1.0]), ("average", [1 / 3] * 3)])
def test_merged_weights(exported: Exported, method: str, expected: list[float]) -> None:
    """W_1 + (W_2 − W_1) + (W_3 − W_1) = −W_1 + W_2 + W_3 in layer 1; layer 0 stays as it is."""
    whole = exported("llama")
    merged, _ = reduced(whole, layers=[2, 3], method=method)
    blocks, now = anatomy_of(whole).blocks, anatomy_of(merged).blocks
    for number, product in enumerate(now[1].products):
        parts = [read_weight(blocks[index].products[number]).astype(np.float64) for index in (1, 2, 3)]
        want = sum(c * part for c, part in zip(expected, parts, strict=True))
        np.testing.assert_allclose(read_weight(product), want, atol=1e-6)
    for one, other in zip(now[0].products, blocks[0].products, strict=True):
        np.testing.assert_array_equal(read_weight(one), read_weight(other))


@pytest.mark.parametrize(("name", "layers"), [("llama", [1]), ("bert", [3]), ("gpt2", [1, 3])])
def test_a_linear_patch_comes_nearer_without_another_node(
    exported: Exported, run: Run, listing: Callable[[ir.Model], str], name: str, layers: list[int]
) -> None:
    """On tokens that it was not fitted to; the graph is that of plain dropping but for the weights.

    Layers with random weights are far from linear: little of what they do can be made up for.
    """
    whole = exported(name)
    samples = samples_for(whole, 24)
    dropped, _ = reduced(whole, layers=layers)
    patched, report = reduced(whole, samples, layers=layers, method="linear")
    assert listing(patched) == listing(dropped)
    assert all(error < 1 for error in report.errors.values())
    want, plain, found = (run(model, feeds_for(model))[0] for model in (whole, dropped, patched))
    assert np.square(found - want).mean() < 0.98 * np.square(plain - want).mean()


@pytest.mark.parametrize("layers", [[0], [2], [1, 2], [0, 2], [3]])
def test_a_product_of_its_own_replaces_linear_layers_exactly(
    graph: Callable[..., ir.Model], run: Run, rng: np.random.Generator, layers: list[int]
) -> None:
    """Layers x + x · A are linear; what stands in for some of them computes the same."""
    width, text, state = 8, "", "e"
    weights = {"table": rng.standard_normal((90, width))}
    for index in range(4):
        text += f"a{index} = MatMul({state}, h__{index}__a)\n b{index} = MatMul(a{index}, h__{index}__b)\n"
        text += f"s{index} = Add({state}, b{index})\n"
        state = f"s{index}"
        weights |= {f"h__{index}__{part}": rng.standard_normal((width, width)) / 4 for part in "ab"}
    weights["head"] = rng.standard_normal((width, 90))
    inputs = ", ".join(f"float[{', '.join(map(str, value.shape))}] {name}" for name, value in weights.items())
    whole = graph(
        f"g (int64[b, n] input_ids, {inputs}) => (float[b, n, 90] logits) "
        f"{{ e = Gather(table, input_ids)\n {text} logits = MatMul({state}, head) }}",
        **{name: value.astype(np.float32) for name, value in weights.items()},
    )
    for value in (output for node in whole.graph for output in node.outputs if output.name != "logits"):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "n", width])
    samples = [{"input_ids": rng.integers(0, 90, (4, 40))} for _ in range(4)]
    cut, report = reduced(whole, samples, layers=layers, method="linear", patch="product")
    feeds = {"input_ids": np.arange(80).reshape(2, 40)}
    (want,), (found,) = run(whole, feeds), run(cut, feeds)
    # The ridge, 1e-7 of the mean square, is what is left; errors are relative to squares.
    np.testing.assert_allclose(found, want, atol=1e-3 * np.abs(want).max())
    assert max(report.errors.values()) < 1e-8
    assert len(anatomy_of(cut).blocks) == 4 - len(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 4}, "model.layers has 4 layers; 4 cannot be removed"),
        ({"layers": [0, 1, 2, 3]}, "model.layers has 4 layers; 4 cannot be removed"),
        ({"layers": [7]}, "model.layers has no layer 7: it has 4"),
        ({"keep": 0.1}, "model.layers has 4 layers; 4 cannot be removed"),
    ],
)
def test_too_much_is_refused(exported: Exported, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reduced(exported("llama"), **options)


@pytest.mark.parametrize(
    "options", [{}, {"drop": 1, "layers": [1]}, {"drop": -1}, {"keep": 0.0}, {"layers": [1, 1]}, {"layers": [-1]}]
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"one of drop|at least 1|must be different"):
        ReduceDepth(**options)


def test_a_model_whose_layers_are_one_layer_is_refused(exported: Exported) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers share weights: \d+ products read"):
        reduced(exported("albert"), drop=1)


def test_quantized_layers_are_refused(exported: Exported) -> None:
    model = exported("llama")
    QuantizeBlocks(bits=4, block_size=16, min_features=16)(model)
    with pytest.raises(UnsupportedModelError, match="structure comes before quantization"):
        reduced(model, layers=[1])


def test_states_in_two_parts_are_refused(exported: Exported) -> None:
    model = exported("llama")
    assert FuseSkipNorm()(model).modified
    with pytest.raises(UnsupportedModelError, match=r"hidden states") as caught:
        reduced(model, layers=[1])
    assert caught.value.hint == "put reduce-depth before fuse-skip-norm"


def test_layers_of_two_kinds_do_not_merge_but_can_be_dropped(exported: Exported) -> None:
    """Gemma 3: layer 5 of 0 to 7 attends to everything, the others to a window."""
    model = exported("gemma3_text")
    with pytest.raises(UnsupportedModelError, match=r"model.layers.4 and model.layers.5 cannot be merged"):
        reduced(model, layers=[5], method="merge")
    merged, _ = reduced(model, layers=[2, 3], method="merge")
    assert len(anatomy_of(merged).blocks) == 6
    dropped, report = reduced(model, layers=[5])
    assert len(anatomy_of(dropped).blocks) == 7
    assert any("layer_types" in reason for reason in report.skipped)


def test_which_of_two_stacks(exported: Exported) -> None:
    model = exported("clip")
    with pytest.raises(UsageError, match="of which stack"):
        reduced(model, layers=[1])
    cut, _ = reduced(model, layers=[1], include=["text_model.*"])
    titles = [block.title for block in anatomy_of(cut).blocks]
    assert [len([title for title in titles if title.startswith(part)]) for part in ("vision", "text")] == [4, 3]


def test_a_layer_that_later_ones_read_from_is_refused(exported: Exported) -> None:
    """As where layers share keys and values: here the last layer reads an inner product of layer 1."""
    model = exported("llama")
    blocks = anatomy_of(model).blocks
    source = blocks[1].products[2].output
    blocks[3].attentions[0].node.replace_input_with(2, source)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.1 cannot be removed: .* reads what its MatMul"):
        reduced(model, layers=[1])


def test_without_samples_for_the_graph_nothing_happens(exported: Exported) -> None:
    _, report = reduced(exported("llama"), drop=2)
    assert not report.matched
    assert report.skipped == {"no sample inputs for this graph": 2}
