"""prune-weights: the zeros asked for, where the samples say they hurt least, and masks that travel on their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.known_results import KnownResults
from onnxpress.errors import BadInputError, UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.io import copy_graph
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.pruning.mask_files import PackedMask, write_masks
from onnxpress.optimizers.pruning.masked_weights import extract_masks
from onnxpress.optimizers.pruning.prune_weights import PruneWeights
from onnxpress.optimizers.quantization.quantize_blocks import QuantizeBlocks
from onnxpress.optimizers.recipe import PassSpec

Exported = Callable[..., ir.Model]
Run = Callable[..., list[NDArray[Any]]]
DATA_FREE = ("magnitude", "l2", "ratio")


def samples(count: int = 8, length: int = 40) -> list[dict[str, NDArray[np.int64]]]:
    generator = np.random.default_rng(0)
    mask = np.ones((2, length), np.int64)
    mask[0, :5] = 0
    types = np.zeros_like(mask)  # of BERT's tokens; the others take none
    return [
        {"input_ids": generator.integers(3, 60, (2, length)), "attention_mask": mask, "token_type_ids": types}
        for _ in range(count)
    ]


def prune(model: ir.Model, **options: Any) -> tuple[ir.Model, Report]:
    copy = copy_graph(model)
    optimizer = PruneWeights(**{"min_features": 8, **options})
    context = Context(Calibration(samples()))
    return copy, optimizer.run(copy, context).report


def weights(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    """Of the products of all blocks, [in, out]."""
    from onnxpress.graph.anatomy.editing import read_weight

    return {p.name: read_weight(p) for block in anatomy_of(model).blocks for p in block.products}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", ["magnitude", "ratio", "wanda", "sparsegpt"])
def test_every_product_of_a_block_gets_its_zeros_and_nothing_else_changes(
    exported: Exported, name: str, method: str
) -> None:
    model = exported(name)
    pruned, report = prune(model, method=method, sparsity=0.25)
    found = weights(pruned)
    assert sum(report.matched.values()) == len(found)
    for weight in found.values():
        zeros = weight == 0
        if method == "wanda":
            assert (zeros.sum(axis=0) == round(0.25 * len(weight))).all()
        else:
            assert zeros.sum() == round(0.25 * weight.size)
    assert (set(report.errors) == set(found)) is (method not in DATA_FREE)
    assert all(0 < error < 1 for error in report.errors.values())
    for key, value in model.graph.initializers.items():
        same = (pruned.graph.initializers[key].const_value.numpy() == value.const_value.numpy()).all()  # type: ignore
        assert same == (key not in found), key


def test_masks_leave_what_stays_alone_and_the_graph_computes_with_them(exported: Exported, run: Run) -> None:
    model = exported("bert")
    pruned, _ = prune(model, pattern="2:4")
    by_hand = copy_graph(model)
    for name, weight in weights(model).items():
        groups = np.abs(weight).reshape(-1, 4, weight.shape[1])
        mask = (np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1) >= 2).reshape(weight.shape)
        np.testing.assert_array_equal(weights(pruned)[name], weight * mask)
        value = by_hand.graph.initializers[name]
        stored = value.const_value.numpy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(stored * (mask if stored.shape == mask.shape else mask.T))
    feeds = {**samples(1)[0], "token_type_ids": np.zeros((2, 40), np.int64)}
    feeds = {value.name: feeds[str(value.name)] for value in model.graph.inputs}
    for got, want in zip(run(pruned, feeds), run(by_hand, feeds), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"pattern": "block:4x4"}, {"rounds": 3}], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_second_run_finds_nothing_to_do(exported: Exported, method: str, options: dict[str, Any]) -> None:
    once, first = prune(exported("llama"), method=method, **options)
    again, second = prune(once, method=method, **options)
    assert not second.matched
    assert second.skipped["as sparse already"] == sum(first.matched.values())
    assert all((a == b).all() for a, b in zip(weights(once).values(), weights(again).values(), strict=True))


def loss(model: ir.Model, reference: ir.Model, run: Run) -> float:
    held_out = samples(9)[8]
    feeds = {str(v.name): held_out.get(str(v.name), np.zeros((2, 2, 0, 16), np.float32)) for v in model.graph.inputs}
    return float(np.square(run(model, feeds)[0] - run(reference, feeds)[0]).mean())


def test_what_samples_tell_buys_quality(exported: Exported, run: Run) -> None:
    """On inputs that were not calibrated on."""
    model = exported("llama")
    found = {m: loss(prune(model, method=m)[0], model, run) for m in ("magnitude", "wanda", "sparsegpt")}
    assert found["sparsegpt"] < found["magnitude"]
    assert found["sparsegpt"] < found["wanda"]
    refitted, _ = prune(model, method="wanda", refit=16)
    assert loss(refitted, model, run) < found["wanda"]


def test_one_cut_through_the_whole_model(exported: Exported) -> None:
    model = exported("llama")
    pruned, _ = prune(model, sparsity=0.4, scope="global")
    found = np.concatenate([weight.reshape(-1) for weight in weights(pruned).values()])
    before = np.abs(np.concatenate([weight.reshape(-1) for weight in weights(model).values()]))
    assert (found == 0).sum() == round(0.4 * found.size)
    assert before[found == 0].max() <= before[found != 0].min()
    assert len({round(float((weight == 0).mean()), 3) for weight in weights(pruned).values()}) > 1


def test_masks_travel_on_their_own(exported: Exported, tmp_path: Path) -> None:
    model = exported("gpt2")
    pruned, first = prune(model, sparsity=0.3)
    write_masks(tmp_path / "a.masks", extract_masks([pruned]))
    options = {"masks": str(tmp_path / "a.masks"), "min_features": 8}
    again, report = prune(model, **options)
    assert report.matched == first.matched
    assert all((a == b).all() for a, b in zip(weights(pruned).values(), weights(again).values(), strict=True))
    assert not PassSpec("prune-weights", options).build().call(again).modified


def test_masks_of_another_model(exported: Exported, tmp_path: Path) -> None:
    name = next(iter(weights(exported("llama"))))
    path = tmp_path / "a.masks"
    write_masks(path, {name: PackedMask.pack(np.zeros((3, 5), np.bool_))})
    with pytest.raises(BadInputError, match=r"shape \[3, 5\], its weight \[64, 64\]"):
        prune(exported("llama"), masks=str(path))
    write_masks(path, {"model.embed_tokens.weight": PackedMask.pack(np.zeros((3, 5), np.bool_))})
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens.weight is for a weight that prune-weights leaves"):
        prune(exported("llama"), masks=str(path))
    write_masks(path, {"elsewhere": PackedMask.pack(np.zeros((3, 5), np.bool_))})
    _, report = prune(exported("llama"), masks=str(path))
    assert not report.matched
    assert report.skipped == {"in the masks' file, but not in this graph": 1}


def test_a_head_that_is_an_embedding_is_left_alone(exported: Exported) -> None:
    _, report = prune(exported("llama"), include=["*embed_tokens*"])
    assert not report.matched
    assert report.skipped["the weight is read by others too, such as an embedding"] == 1


def test_weights_of_two_decoders_stay_the_same(exported: Exported) -> None:
    optimizer, known = PruneWeights(min_features=8), KnownResults()
    models = [exported("t5", stem) for stem in ("decoder_model", "decoder_with_past_model")]
    for model in models:
        optimizer.run(model, Context(known=known))
    first, second = (weights(model) for model in models)
    shared = first.keys() & second.keys()
    assert shared
    assert all((first[name] == second[name]).all() for name in shared)


def test_a_weight_of_two_products_is_masked_but_not_fitted(graph: Exported) -> None:
    generator = np.random.default_rng(0)
    model = graph(
        """g (int64[batch_size, n] input_ids, float[60, 16] table, float[16, 16] h__0__up, float[16, 16] h__1__up)
        => (float[batch_size, n, 16] y) {
            e = Gather (table, input_ids)
            a = MatMul (e, h__0__up)
            b = Tanh (a)
            c = MatMul (b, h__0__up)
            s = Add (e, c)
            f = MatMul (s, h__1__up)
            t = Tanh (f)
            y = Add (s, t)
        }""",
        **{
            name: generator.standard_normal(shape).astype(np.float32)
            for name, shape in {"table": (60, 16), "h__0__up": (16, 16), "h__1__up": (16, 16)}.items()
        },
    )
    _, report = prune(model, method="wanda")
    assert sum(report.matched.values()) == 2
    _, report = prune(model, method="sparsegpt")
    assert report.matched == {"50% zeros": 1}
    assert report.skipped["the weight serves several products, and would be fitted to one of them"] == 2


def test_quantized_weights_are_refused(exported: Exported) -> None:
    model = exported("llama")
    QuantizeBlocks(min_features=8, include=["*layers.1.*"])(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.\S+ is not float32 any more"):
        prune(model)
    _, report = prune(model, exclude=["*layers.1.*"])
    assert report.matched


def test_a_pattern_that_does_not_divide_names_the_weight(exported: Exported) -> None:
    with pytest.raises(UsageError, match=r"prune-weights: \S+q_proj\S*: groups of 7 do not divide 64 inputs"):
        prune(exported("llama"), pattern="3:7")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity must be at least 0"),
        ({"pattern": "half"}, "pattern must be"),
        ({"pattern": "2:4", "sparsity": 0.75}, "makes sparsity 0.5, not 0.75"),
        ({"pattern": "2:4", "rounds": 2}, "rounds"),
        ({"method": "wanda", "scope": "global"}, "scope = global goes with"),
        ({"strength": 2.0}, "strength"),
        ({"damping": 0.0}, "damping"),
        ({"refit": -1}, "refit"),
        ({"method": "movement"}, "method"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PassSpec("prune-weights", options).build()


def test_too_few_tokens_and_none(exported: Exported) -> None:
    optimizer = PruneWeights(method="sparsegpt", min_features=8)
    context = Context(Calibration(samples(1)))
    with pytest.raises(BadInputError, match="75 tokens to calibrate with; it needs at least 256"):
        optimizer.run(exported("llama"), context)
    context = Context(Calibration())
    report = optimizer.run(exported("llama"), context).report
    assert not report.matched
    assert list(report.skipped) == ["no sample inputs for this graph"]
