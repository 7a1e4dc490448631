"""Names of weights that torch's exporters drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.graph.anatomy.layers import TORCH_SCOPES
from onnxpress.graph.report import Report
from onnxpress.optimizers.fusion.name_weights import name_weights

TEXT = """g (float[B, 4] x, float[4, 4] u, float[4, 4] v) => (float[B, 4] z) <float[B, 4] y> {
    y = MatMul(x, u)
    z = MatMul(y, v)
}"""


@pytest.fixture
def model(graph: Any, rng: np.random.Generator) -> ir.Model:
    weights = {name: rng.standard_normal((4, 4), dtype=np.float32) for name in "uv"}
    found: ir.Model = graph(TEXT, **weights)
    found.graph.initializers["u"].name = "onnx::MatMul_529"
    return found


def names(model: ir.Model) -> list[str]:
    return sorted(model.graph.initializers)


def test_from_the_name_of_a_node_and_from_what_torch_records(model: ir.Model) -> None:
    first, second = model.graph
    first.name = "/encoder/layer.0/attention/self/query/MatMul"
    second.metadata_props[TORCH_SCOPES] = "['', 'model', 'model.layers.0', 'model.layers.0.mlp.up_proj', 'linear_5']"
    name_weights(model.graph, report := Report())
    assert report.matched == {"names of weights": 2}
    assert names(model) == ["encoder.layer.0.attention.self.query.weight", "model.layers.0.mlp.up_proj.weight"]
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.name == value.name
    name_weights(model.graph, report := Report())
    assert not report.matched


def test_a_name_with_a_path_is_kept(model: ir.Model) -> None:
    first, _ = model.graph
    first.name = "/h.0/mlp/MatMul"
    model.graph.initializers["onnx::MatMul_529"].name = "h.0.mlp.c_fc.weight"
    name_weights(model.graph, report := Report())
    assert names(model) == ["h.0.mlp.c_fc.weight", "v"]
    assert not report.matched


def test_two_matrices_of_one_module(model: ir.Model) -> None:
    for count, node in enumerate(model.graph):
        node.name = f"/layers.0/mlp/MatMul_{count}"
    before = names(model)
    name_weights(model.graph, report := Report())
    assert names(model) == before
    assert report.skipped == {"name of a weight is not clear": 2}


def test_a_name_that_is_taken(model: ir.Model) -> None:
    first, second = model.graph
    first.name, second.name = "/layers.0/mlp/up/MatMul", "/head/MatMul"
    model.graph.initializers["v"].name = "layers.0.mlp.up.weight"
    name_weights(model.graph, report := Report())
    assert report.skipped == {"name of a weight is not clear": 1}
    assert not report.matched


def test_a_path_that_lost_its_beginning(model: ir.Model) -> None:
    """As OPT's does, whose head calls `self.model.decoder`."""
    first, _ = model.graph
    first.name = "/decoder/layers.0/self_attn/q_proj/MatMul"
    model.graph.initializers["v"].name = "model.decoder.layers.0.fc1.weight"
    name_weights(model.graph, Report())
    assert names(model) == ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.self_attn.q_proj.weight"]
