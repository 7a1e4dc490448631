"""Mixtures of experts: what is recognised, that the operator computes it, and that experts are read one at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from onnxpress.exporter import architectures
from onnxpress.exporter.fusing import recognise
from onnxpress.exporter.layers.traced import on_meta
from onnxpress.exporter.sources.checkpoint import load_folder
from onnxpress.exporter.sources.parameters import ConvertedTensor, match_parameters
from onnxpress.exporter.tracing.binding import bind
from onnxpress.exporter.tracing.lowering import PLACEHOLDERS
from onnxpress.graph.io import save_graph
from onnxpress.graph.tensors import ArrayTensor, FileTensor
from onnxpress.optimizers.fusion.clean_up import CleanUp

EXPERTS, HIDDEN, INNER, TOKENS, CHOSEN = 4, 64, 32, 33, 2


def mixtral(**changes: Any) -> Any:
    return architectures.tiny_config("mixtral", **changes)


def qwen(**changes: Any) -> Any:
    return architectures.tiny_config("qwen2_moe", **changes)


class Sigmoid(MixtralTopKRouter):
    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, chosen = torch.sigmoid(logits).topk(self.top_k, dim=-1)
        return logits, weights, chosen


def test_routers_are_told_by_what_they_compute() -> None:
    with torch.device("meta"):
        routers = [
            MixtralTopKRouter(mixtral()),
            Qwen2MoeTopKRouter(qwen()),
            Qwen2MoeTopKRouter(qwen(norm_topk_prob=True)),
            Sigmoid(mixtral()),
            nn.Linear(8, 4),
        ]
    normalized, plain = recognise.Router(normalized=True), recognise.Router(normalized=False)
    assert [recognise.softmax_router(router) for router in routers] == [normalized, plain, normalized, None, None]


def test_only_experts_gated_by_silu_are_the_operators() -> None:
    with torch.device("meta"):
        experts = MixtralExperts(mixtral())
    assert recognise.is_experts(experts)
    assert recognise.not_swiglu(experts) is None
    experts.act_fn = ACT2FN["gelu"]
    assert recognise.not_swiglu(experts) == "its experts are not gated by SiLU"
    experts.has_bias = True
    assert recognise.not_swiglu(experts) == "its experts have biases, no gate, or weights in another order"


def placeholder(normalized: int) -> ir.Model:
    """y = Experts(2 · x): nothing but the mixture needs 2 · x, so that the runtime may write over it."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["tokens", HIDDEN]), type=floats)
    logits = ir.Value(name="logits", shape=ir.Shape(["tokens", EXPERTS]), type=floats)
    gate_up = ir.Value(name="gate_up", shape=ir.Shape([EXPERTS, 2 * INNER, HIDDEN]), type=floats)
    down = ir.Value(name="down", shape=ir.Shape([EXPERTS, HIDDEN, INNER]), type=floats)
    two = ir.Value(name="two", const_value=ir.tensor(np.float32(2), name="two"), shape=ir.Shape(()), type=floats)
    twice = ir.node("Mul", [x, two])
    attributes = {"k": CHOSEN, "normalized": normalized}
    mixture = ir.node("Experts", [twice.outputs[0], logits, gate_up, down], attributes, domain=PLACEHOLDERS)
    for node in (twice, mixture):
        node.outputs[0].shape, node.outputs[0].type = x.shape, floats
    mixture.outputs[0].name = "y"
    graph = ir.Graph(
        [x, logits],
        [mixture.outputs[0]],
        nodes=[twice, mixture],
        initializers=[gate_up, down, two],
        opset_imports={"": 21, PLACEHOLDERS: 1},
    )
    return ir.Model(graph, ir_version=10)


def oracle(x: Any, logits: Any, gate_up: Any, down: Any, normalized: int) -> Any:
    """Token by token, in float64."""
    result = np.zeros(x.shape)
    for token, states in enumerate(x.astype(np.float64)):
        odds = np.exp(logits[token].astype(np.float64))
        chosen = np.argsort(-odds)[:CHOSEN]
        weights = odds / (odds[chosen].sum() if normalized else odds.sum())
        for expert in chosen:
            gate, up = np.split(gate_up[expert] @ states, 2)
            result[token] += weights[expert] * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return result


@pytest.mark.parametrize("normalized", [0, 1])
@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_the_operator_computes_the_mixture(normalized: int, cleaned: bool, level: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    normal = lambda *shape: generator.standard_normal(shape, np.float32)  # noqa: E731
    gate_up, down = normal(EXPERTS, 2 * INNER, HIDDEN) * 0.1, normal(EXPERTS, HIDDEN, INNER) * 0.1
    x, logits = normal(TOKENS, HIDDEN), normal(TOKENS, EXPERTS)
    model = placeholder(normalized)
    bind(model, {"gate_up": ArrayTensor("gate_up", gate_up), "down": ArrayTensor("down", down)})
    if cleaned:
        CleanUp()(model)
    assert [node.op_type for node in model.graph] == ["Mul", "MoE", "Where"]
    save_graph(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x, "logits": logits})[0]
    # sums of 64 and 32 products of size 0.1 in float32: a few units of 2^-24 relative to outputs of about 1
    np.testing.assert_allclose(found, oracle(2 * x, logits, gate_up, down, normalized), atol=1e-5)


def test_experts_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures.tiny_model("mixtral", tmp_path)
    checkpoint = load_folder(tmp_path, SimpleNamespace(name="mixtral"))  # type: ignore[arg-type]
    config = mixtral()
    from transformers import MixtralForCausalLM

    source = match_parameters(on_meta(MixtralForCausalLM, config), checkpoint.tensors)[
        "model.layers.1.mlp.experts.gate_up_proj"
    ]
    assert isinstance(source, ConvertedTensor)
    whole = source.numpy()
    read: list[str] = []
    original = FileTensor.mapped
    monkeypatch.setattr(FileTensor, "mapped", lambda self: (read.append(self.name), original(self))[1])
    assert source.reads_rows
    np.testing.assert_array_equal(source.rows(2, 3), whole[2:3])
    prefix = "model.layers.1.block_sparse_moe.experts.2."
    assert sorted(read) == [f"{prefix}w1.weight", f"{prefix}w3.weight"]


def test_a_router_that_is_not_the_operators_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognise, "softmax_router", lambda module: None)
    row = architectures.try_architecture("mixtral", tmp_path)
    assert row.not_fused == {"experts": "its router is not softmax and top-k"}
    assert "MoE" not in row.operators
    assert row.method == "fused"
    assert max(row.differences.values()) <= 1e-4
