"""repair: back towards the reference, drift included; nothing that held-out tokens do not bear out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.arrays import Feeds
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.anatomy.editing import read_weight, set_bias, set_weight
from onnxpress.graph.conventions import LAYERS
from onnxpress.graph.io import copy_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.fusion.fuse_skip_norm import FuseSkipNorm
from onnxpress.optimizers.pruning.repair import Repair, match_blocks
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic

Exported = Callable[..., ir.Model]
Run = Callable[..., list[NDArray[Any]]]


def feeds(model: ir.Model, batch: int = 4, length: int = 24, seed: int = 0) -> Feeds:
    """Random tokens; the last row ends with padding."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[-1, -4:] = 0
    found: Feeds = {
        "input_ids": rng.integers(3, 60, (batch, length)),
        "attention_mask": mask,
        "position_ids": np.broadcast_to(np.arange(length), (batch, length)).copy(),
        "token_type_ids": np.zeros((batch, length), np.int64),
    }
    names = {value.name for value in model.graph.inputs}
    return {name: array for name, array in found.items() if name in names}


def outputs(run: Run, model: ir.Model, given: Feeds) -> NDArray[Any]:
    """The first output where it is no padding."""
    whole = dict(given)
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            assert value.shape is not None
            whole[str(value.name)] = np.zeros([len(given["input_ids"]), value.shape[1], 0, value.shape[3]], np.float32)
    found: NDArray[Any] = run(model, whole)[0][given["attention_mask"] == 1]
    return found


def repaired(model: ir.Model, reference: ir.Model, samples: int = 8, **options: Any) -> tuple[ir.Model, Any]:
    copy = copy_graph(model)
    optimizer = Repair(**options)
    context = Context(Calibration([feeds(model, seed=100 + i) for i in range(samples)]), reference)
    return copy, optimizer.run(copy, context).report


def damage(model: ir.Model, rng: np.random.Generator, part: str = "both") -> None:
    """Noise in what ends attention and feed-forward; biases of encoders as well."""
    for block in anatomy_of(model).blocks:
        for product in (block.attentions[0].output, block.feed_forward.down if block.feed_forward else None):
            assert product is not None
            if part != "both" and (product is block.attentions[0].output) != (part == "attention"):
                continue
            weight = read_weight(product)
            set_weight(product, weight + 0.5 * weight.std() * rng.standard_normal(weight.shape).astype(np.float32))
            if product.bias is not None:
                set_bias(product, rng.standard_normal(weight.shape[1]) / 5)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "falcon", "gemma2"])
@pytest.mark.parametrize("fused", [False, True])
def test_damage_to_the_weights_that_are_fitted_is_undone(
    exported: Exported, run: Run, rng: np.random.Generator, name: str, fused: bool
) -> None:
    """The reference's weights are within reach, so that it finds them; whether norms add the residual or not."""
    reference = exported(name)
    model = exported(name)
    if fused:
        FuseSkipNorm()(model)
    damage(model, rng)
    found, report = repaired(model, reference, ridges=[1e-5, 0.1])
    given = feeds(model)
    expected = outputs(run, reference, given)
    before, after = (np.square(outputs(run, one, given) - expected).sum() for one in (model, found))
    # Where attention and feed-forward are parallel, the first is fitted to a sum with what the other still does wrong.
    assert after < (0.2 if name == "falcon" else 1e-3) * before
    assert report.matched["product"] == 2 * len(anatomy_of(model).blocks)
    for weight, error in report.errors.items():
        if "before" not in weight:
            assert error < report.errors[f"{weight} (before)"]


def test_drift_is_corrected(exported: Exported, run: Run, rng: np.random.Generator) -> None:
    """Only the first block's `v` is damaged, which is not fitted: what comes after makes up for part of it."""
    reference, model = exported("llama"), exported("llama")
    value = anatomy_of(model).blocks[0].attentions[0].value
    assert value is not None
    weight = read_weight(value)
    set_weight(value, weight + weight.std() * rng.standard_normal(weight.shape).astype(np.float32))
    found, report = repaired(model, reference, samples=30)
    given = feeds(model, seed=5)
    expected = outputs(run, reference, given)
    before, after = (np.square(outputs(run, one, given) - expected).sum() for one in (model, found))
    assert after < 0.8 * before
    assert report.matched["product"]


def test_nothing_to_repair(exported: Exported) -> None:
    """The weights that are there are the best, so that held-out tokens bear out no change."""
    reference = exported("llama")
    _, report = repaired(reference, reference)
    assert not report.matched
    assert report.skipped == {"no better on held-out tokens": 2 * len(anatomy_of(reference).blocks)}
    assert max(report.errors.values()) < 1e-6


def test_parts_and_names(exported: Exported, rng: np.random.Generator) -> None:
    reference, model = exported("llama"), exported("llama")
    damage(model, rng)
    layers = len(anatomy_of(model).blocks)
    found, report = repaired(model, reference, parts=["feed-forward"], exclude=["*.layers.0.*"])
    assert report.matched == {"product": layers - 1}
    assert report.skipped == {"excluded": layers + 1}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        other = found.graph.initializers[name].const_value
        assert other is not None
        changed = bool((other.numpy() != value.const_value.numpy()).any())
        assert changed == ("down_proj" in name and "layers.0." not in name), name


def test_quantized_products_are_left_and_float_ones_repaired(
    exported: Exported, run: Run, rng: np.random.Generator
) -> None:
    """gate, up and down in 8 bits: attention's `o` is still float and makes up for what it can."""
    reference, model = exported("llama"), exported("llama")
    damage(model, rng, "attention")
    QuantizeDynamic("uint8", "per_token", min_features=8, include=["*mlp*"])(model)
    found, report = repaired(model, reference)
    layers = len(anatomy_of(model).blocks)
    assert report.matched == {"product": layers}
    assert sum(count for reason, count in report.skipped.items() if "not float32 any more" in reason) == layers
    given = feeds(model)
    expected = outputs(run, reference, given)
    before, after = (np.square(outputs(run, one, given) - expected).sum() for one in (model, found))
    assert after < 0.2 * before


def test_layers_that_were_removed(exported: Exported) -> None:
    """Layers are matched by what the pass that removed them recorded; without a record there is a refusal."""
    reference, model = exported("llama"), exported("llama")
    anatomy = anatomy_of(reference)
    layers = len(anatomy.blocks)
    current = type(anatomy)(
        anatomy.segments, anatomy.blocks[: layers - 1], anatomy.embeddings, anatomy.final_norms, anatomy.head
    )
    with pytest.raises(UnsupportedModelError, match=f"has {layers - 1} layers, the reference {layers}"):
        match_blocks(model, current, anatomy)
    model.metadata_props[LAYERS] = json.dumps({"model.layers": [0, *range(2, layers)]})
    found = match_blocks(model, current, anatomy)
    assert [block.title for block in found.values()] == [f"model.layers.{i}" for i in (0, *range(2, layers))]
    assert list(found) == [f"model.layers.{i}" for i in range(layers - 1)]


def test_without_a_reference_or_samples_nothing_happens(exported: Exported) -> None:
    model = exported("llama")
    optimizer = Repair()
    report = optimizer.call(model).report
    assert report.skipped == {"no reference: there is nothing to repair towards": 1}
    context = Context(reference=exported("llama"))
    report = optimizer.run(model, context).report
    assert not report.matched
    assert list(report.skipped) == ["no sample inputs for this graph"]


def test_another_hidden_size_is_refused(graph: Callable[..., ir.Model]) -> None:
    def model(width: int) -> ir.Model:
        ones = np.ones((width, width), np.float32)
        return graph(
            f"""g (float[B, S, {width}] x, float[{width}, {width}] m__layers__0__up__weight,
                float[{width}, {width}] m__layers__0__down__weight) => (float[B, S, {width}] y) {{
                a = MatMul(x, m__layers__0__up__weight)
                b = Tanh(a)
                d = MatMul(b, m__layers__0__down__weight)
                y = Add(x, d) }}""",
            m__layers__0__up__weight=ones,
            m__layers__0__down__weight=ones,
        )

    optimizer = Repair()
    context = Context(reference=model(8))
    with pytest.raises(UnsupportedModelError, match="writes 6 features, the reference's 8"):
        optimizer.run(model(6), context)


def test_a_walk_that_goes_on(exported: Exported, rng: np.random.Generator, tmp_path: Path) -> None:
    """Killed after two layers, the second run gives what one run gives."""
    reference, model = exported("llama"), exported("llama")
    damage(model, rng)
    expected, _ = repaired(model, reference)

    class KilledError(Exception):
        pass

    calls = []

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if calls.count(3) == 2:  # the reference's third, and the model's
            raise KilledError

    samples = [feeds(model, seed=100 + i) for i in range(8)]
    optimizer = Repair()
    context = Context(Calibration(samples, tmp_path, progress=kill), reference)
    with pytest.raises(KilledError):
        optimizer.run(copy_graph(model), context)
    found = copy_graph(model)
    optimizer = Repair()
    context = Context(Calibration(samples, tmp_path), reference)
    optimizer.run(found, context)
    for name, value in expected.graph.initializers.items():
        other = found.graph.initializers[name].const_value
        assert other is not None
        assert value.const_value is not None
        np.testing.assert_array_equal(other.numpy(), value.const_value.numpy(), name)


@pytest.mark.parametrize("options", [{"ridges": []}, {"ridges": [0.0]}, {"priors": []}, {"parts": []}])
def test_requests_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give at least one|ridges are"):
        Repair(**options)
