"""The walk over real exports: block by block the activations are those of the whole graph, padding left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from onnxpress.arrays import Floats
from onnxpress.calibration.feeds import feed_of
from onnxpress.calibration.walk import Walk
from onnxpress.graph.anatomy import find_products
from onnxpress.graph.io import copy_graph

LEFT = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
RIGHT = np.ascontiguousarray(LEFT[:, ::-1])


class Rows(list[Floats]):
    def update(self, x: Floats, sample: int) -> None:
        self.append(x.copy())


def text(mask: NDArray[np.int64], seed: int = 0) -> dict[str, NDArray[Any]]:
    ids = np.random.default_rng(seed).integers(3, 100, mask.shape)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def translation() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, 6, 64)).astype(np.float32)
    return {
        "input_ids": rng.integers(3, 100, (3, 4)),
        "decoder_attention_mask": RIGHT[:, :4],
        "encoder_hidden_states": states,
        "encoder_attention_mask": RIGHT,
    }


CASES: dict[tuple[str, str], Callable[[], dict[str, NDArray[Any]]]] = {
    ("llama", "model"): lambda: text(LEFT),
    ("phi3", "model"): lambda: text(LEFT),
    ("mixtral", "model"): lambda: text(LEFT),
    ("falcon", "model"): lambda: text(LEFT),
    ("bert", "model"): lambda: text(RIGHT),
    ("albert", "model"): lambda: text(RIGHT),
    ("t5", "encoder_model"): lambda: text(RIGHT),
    ("t5", "decoder_model"): translation,
}


@pytest.mark.parametrize(("name", "stem"), CASES)
def test_the_same_as_all_at_once(
    name: str, stem: str, exported: Callable[..., ir.Model], run: Callable[..., list[Floats]]
) -> None:
    model, sample = exported(name, stem), CASES[name, stem]()
    walk = Walk(model, [sample])
    found: dict[str, Rows] = {}
    for step in walk:
        here = {str(product.activation.name): Rows() for product in find_products(step.segment.nodes)}
        step.observe({key: [rows] for key, rows in here.items()})
        found |= here
    assert (walk.reason is None) is (name != "albert")
    for key, expected in whole(model, sample, list(found), run).items():
        np.testing.assert_allclose(np.concatenate(found[key]), expected, rtol=1e-4, atol=1e-4, err_msg=key)


def whole(
    model: ir.Model, sample: dict[str, NDArray[Any]], names: list[str], run: Callable[..., list[Floats]]
) -> dict[str, Floats]:
    """Values of a run of the whole graph; where a sample's rows are of one of its masks, the real ones."""
    tapped = copy_graph(model)
    values = {str(value.name): value for node in tapped.graph for value in node.outputs}
    names = [name for name in names if name in values]
    tapped.graph.outputs[:] = [values[name] for name in names]
    for value in tapped.graph.outputs:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), None
    feeds = {str(value.name): feed_of(value, sample) for value in tapped.graph.inputs}
    masks = [
        sample[key] != 0
        for key in ("decoder_attention_mask", "encoder_attention_mask", "attention_mask")
        if key in sample
    ]
    real = {}
    for name, array in zip(names, run(tapped, feeds), strict=True):
        lead = array.shape[:2] if array.ndim == 3 else array.shape[:1]
        mask = next((mask.reshape(lead) for mask in masks if mask.size == np.prod(lead)), None)
        real[name] = array.reshape(-1, array.shape[-1]) if mask is None else array[mask]
    return real
