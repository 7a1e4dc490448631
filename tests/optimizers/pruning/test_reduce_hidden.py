"""reduce-hidden: a rotated stream gives the same outputs, one in a subspace is sliced exactly, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.pruning.reduce_hidden import ReduceHidden
from onnxpress.optimizers.pruning.stream import find_stream
from onnxpress.optimizers.quantization.quantize_dynamic import QuantizeDynamic

Exported = Callable[..., ir.Model]
Run = Callable[..., list[np.ndarray]]


def feeds(model: ir.Model, seed: int = 0, past: int = 0, padding: int = 0) -> dict[str, Any]:
    """Two rows of six tokens, or of one after a cache; the second row with padding on its left."""
    rng = np.random.default_rng(seed)
    length = 1 if past else 6
    mask = np.ones((2, past + length), np.int64)
    mask[1, :padding] = 0
    found: dict[str, Any] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name == "input_ids":
            found[name] = rng.integers(5, 60, (2, length))
        elif name == "attention_mask":
            found[name] = mask
        elif name == "position_ids":
            found[name] = np.tile(np.arange(past, past + length), (2, 1))
        else:
            assert value.shape is not None
            heads, size = int(value.shape[1]), int(value.shape[3])  # type: ignore[arg-type]
            found[name] = rng.standard_normal((2, heads, past, size), dtype=np.float32)
    return found


def reduced(model: ir.Model, **options: Any) -> tuple[ir.Model, Any]:
    copy = model.clone()
    optimizer = ReduceHidden(**options)
    samples = [feeds(model, seed) for seed in range(4)]
    context = Context(
        Calibration([{name: array for name, array in sample.items() if array.size} for sample in samples])
    )
    return copy, optimizer.run(copy, context)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("given", [{}, {"past": 3}, {"padding": 2}])
def test_a_rotation_changes_nothing(exported: Exported, run: Run, name: str, tie: bool, given: dict[str, int]) -> None:
    model = exported(name)
    width = find_stream(model).width
    rng = np.random.default_rng(1)
    for block in anatomy_of(model).blocks:  # gains of their own
        for norm in block.norms:
            gain = norm.inputs[1]
            assert gain is not None
            gain.const_value = ir.tensor(rng.uniform(0.5, 2, width).astype(np.float32), name=gain.name)
    copy, result = reduced(model, width=width, tie=tie)
    assert result.report.matched
    data = feeds(model, 9, **given)
    for got, want in zip(run(copy, data), run(model, data), strict=True):
        real = slice(given.get("padding", 0), None) if got.ndim == 3 else slice(None)
        np.testing.assert_allclose(got[:, real], want[:, real], atol=1e-4 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_stream_in_a_subspace_is_sliced_exactly(exported: Exported, run: Run, name: str) -> None:
    model = exported(name)
    stream = find_stream(model)
    rng = np.random.default_rng(2)
    kept = stream.width // 2
    basis = np.linalg.qr(np.hstack([np.ones((stream.width, 1)), rng.standard_normal((stream.width, kept - 1))]))[0]
    inside = (basis @ basis.T).astype(np.float32)
    for table in stream.tables:
        assert table.const_value is not None
        table.const_value = ir.tensor(table.const_value.numpy() @ inside, name=table.name)
    for product in stream.writers.values():
        for weight in (product.weight, product.bias):
            if weight is not None:
                assert weight.const_value is not None
                weight.const_value = ir.tensor(weight.const_value.numpy() @ inside, name=weight.name)
    copy, _ = reduced(model, width=kept)
    assert find_stream(copy).width == kept
    data = feeds(model, 9)
    for got, want in zip(run(copy, data), run(model, data), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-3 * max(1, np.abs(want).max()))


def test_a_narrower_model_is_still_one(exported: Exported, run: Run) -> None:
    model = exported("llama")
    width = find_stream(model).width
    copy, _ = reduced(model, ratio=0.5, multiple_of=4)
    before, after = anatomy_of(model), anatomy_of(copy)
    assert after.blocks[0].attentions[0].query.features[0] == width // 2
    assert after.blocks[0].attentions[0].query.features[1] == before.blocks[0].attentions[0].query.features[1]
    QuantizeDynamic("uint8", "per_token", min_features=4)(copy)
    assert np.isfinite(run(copy, feeds(model))[0]).all()


def test_post_norm_is_refused(exported: Exported) -> None:
    with pytest.raises(UnsupportedModelError, match=r"post-norm|gain of the norm"):
        ReduceHidden(width=8)(exported("bert"))


def test_more_than_there_is_is_refused(exported: Exported) -> None:
    with pytest.raises(UsageError, match="is more"):
        ReduceHidden(width=100000)(exported("llama"))


def test_without_samples_nothing_is_done(exported: Exported, listing: Callable[[ir.Model], str]) -> None:
    model = exported("llama")
    before = listing(model)
    assert not ReduceHidden(width=8)(model).report.matched  # type: ignore[attr-defined]
    assert listing(model) == before


@pytest.mark.parametrize("options", [{}, {"width": 8, "ratio": 0.5}, {"width": 0}, {"ratio": 1.5}])
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"width|ratio"):
        ReduceHidden(**options)
