"""Decoders with a cache that rotate a part of each head, as torch's older exporter and optimum write them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxpress.arrays import Feeds
from onnxpress.calibration.calibration import Calibration
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.io import copy_graph, load_graph
from onnxpress.optimizers.base import Context
from onnxpress.optimizers.fusion.fuse_foreign import FuseForeign
from onnxpress.optimizers.heads.packed import unpacked
from onnxpress.optimizers.heads.reduce_heads import ReduceHeads
from onnxpress.optimizers.heads.sites import pack_weights, site_of, table_width

from .test_fuse_cached_attention import CASES

HEADS, SIZE, LAYERS = 4, 16, 2
SIZES = {
    "vocab_size": 100,
    "hidden_size": HEADS * SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
HALF = {"partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25}, "MultiHeadAttention", 4),
    "stablelm": ("StableLm", HALF | {"num_key_value_heads": 4, "use_qkv_bias": True}, "MultiHeadAttention", 8),
    "stablelm in groups": ("StableLm", HALF | {"num_key_value_heads": 2}, "GroupQueryAttention", 8),
    "phi": ("Phi", HALF, "MultiHeadAttention", 8),
}
"""What transformers calls it, its configuration, what its attention becomes, and how many features are rotated."""


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ir.Model]:
    """`traced("StableLm", partial_rotary_factor=0.5)`: a copy of a random model's graph."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    class WithCache(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> Any:
            known = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": True}
            found = self.model(input_ids, past_key_values=known, **given)
            present = (value for layer in found.past_key_values.layers for value in (layer.keys, layer.values))
            return (found.logits, *present)

    @cache
    def graph(name: str, attention: str, more: tuple[tuple[str, Any], ...]) -> ir.Model:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SIZES | dict(more), attn_implementation=attention)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():  # far from uniform; biases and gains that a graph must not lose
            parameter.data += 0.1 * torch.randn_like(parameter)
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        size, kv_heads = dict(more).get("head_dim", SIZE), dict(more).get("num_key_value_heads", HEADS)
        past = [torch.randn(2, kv_heads, 4, size) for _ in range(2 * LAYERS)]
        ids, mask, positions = torch.randint(0, 90, (2, 3)), torch.ones(2, 7, dtype=torch.int64), torch.arange(4, 7)
        sides = [f"{layer}.{side}" for layer in range(LAYERS) for side in ("key", "value")]
        new, total = {0: "batch_size", 1: "sequence_length"}, {0: "batch_size", 1: "total_sequence_length"}
        axes = {"input_ids": new, "position_ids": new, "logits": new, "attention_mask": total}
        axes |= {f"past_key_values.{one}": {0: "batch_size", 2: "past_sequence_length"} for one in sides}
        axes |= {f"present.{one}": {0: "batch_size", 2: "total_sequence_length"} for one in sides}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                WithCache(model),
                (ids, mask, positions.expand(2, -1), *past),
                path,
                dynamo=False,
                dynamic_axes=axes,
                input_names=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    *(f"past_key_values.{one}" for one in sides),
                ],
                output_names=["logits", *(f"present.{one}" for one in sides)],
            )
        return load_graph(path)

    return lambda name, attention="sdpa", **more: copy_graph(graph(name, attention, tuple(more.items())))


@pytest.fixture
def family(traced: Callable[..., ir.Model]) -> Callable[..., ir.Model]:
    return lambda name, attention="sdpa": traced(FAMILIES[name][0], attention, **FAMILIES[name][1])


def feeds(model: ir.Model, visible: Any, past: int, seed: int = 0) -> Feeds:
    rng, mask = np.random.default_rng(seed), np.array(visible)
    found: Feeds = {
        "input_ids": rng.integers(3, 90, (len(mask), mask.shape[1] - past)),
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:],
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            assert value.shape is not None
            shape = (len(mask), int(value.shape[1]), past, SIZE)  # type: ignore[arg-type]
            found[str(value.name)] = rng.standard_normal(shape, dtype=np.float32)
    return found


def fused(model: ir.Model) -> Mapping[str, int]:
    report = FuseForeign()(model).report
    assert not report.skipped
    return report.matched


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_one_operator(family: Any, run: Any, listing: Any, name: str, attention: str) -> None:
    _, _, operator, rotated = FAMILIES[name]
    model = family(name, attention)
    cases = {case: feeds(model, *given) for case, given in CASES.items()}
    want = {case: run(model, given) for case, given in cases.items()}
    matched = fused(model)
    assert matched[operator] == LAYERS
    assert matched["RotaryEmbedding"] == matched["rotations of a part of each head"] == 2 * LAYERS
    assert matched["heads packed side by side"] == (LAYERS if name == "gpt_neox" else 0)
    for case, given in cases.items():
        visible = given["attention_mask"][:, -given["input_ids"].shape[1] :].astype(bool)
        logits, *present = run(model, given)
        np.testing.assert_allclose(logits[visible], want[case][0][visible], atol=2e-5, err_msg=case)
        for found, wanted in zip(present, want[case][1:], strict=True):  # rows of padding are what attention made them
            places = given["attention_mask"].astype(bool)[:, None, :, None] & np.ones_like(wanted, bool)
            np.testing.assert_allclose(found[places], wanted[places], atol=2e-5, err_msg=case)
    rotations = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert {node.attributes["rotary_embedding_dim"].value for node in rotations} == {rotated}
    assert {"Softmax", "Neg"}.isdisjoint(node.op_type for node in model.graph)
    before = listing(model)
    assert not FuseForeign()(model).modified
    assert listing(model) == before
    block = anatomy_of(model).blocks[0]
    with unpacked(model, [(block, block.attentions[0])]):
        block = anatomy_of(model).blocks[0]
        assert site_of(block, block.attentions[0]).sizes[0] == HEADS  # nothing but a rotation around the operator


@pytest.mark.parametrize("name", FAMILIES)
def test_anatomy(family: Any, name: str) -> None:
    """Rotations in front of either operator are those of the attention."""
    fused(model := family(name))
    for block in anatomy_of(model).blocks:
        (attention,) = block.attentions
        assert (attention.heads, attention.head_dim) == (HEADS, SIZE)
        assert attention.packed == (name == "gpt_neox")
        assert attention.rotary is not None
        assert table_width(attention.rotary) == FAMILIES[name][3] // 2


def reduce(model: ir.Model, **options: int) -> Mapping[str, int]:
    one = ReduceHeads(**options)
    samples = [feeds(model, [[1] * 11] * 2, 0, seed) for seed in range(6)]
    context = Context(Calibration([{key: one for key, one in given.items() if one.size} for given in samples]))
    return one.run(model, context).report.matched


@pytest.mark.parametrize("name", FAMILIES)
def test_silent_heads_go_and_nothing_changes(family: Any, run: Any, name: str) -> None:
    fused(model := family(name))
    chosen = [(block, one) for block in anatomy_of(model).blocks for one in block.attentions]
    with unpacked(model, chosen):
        for block in anatomy_of(model).blocks:
            site = site_of(block, block.attentions[0])
            weights = site.read()
            weights.output[[0, 3]] = 0
            site.write({key: ir.tensor(array) for key, array in pack_weights(site, weights).items()})
    smaller = copy_graph(model)
    kv_heads = 2 if name == "stablelm in groups" else HEADS
    assert reduce(smaller, heads=2) == {f"4/{kv_heads} heads × 16 → 2/2 heads × 16": LAYERS}
    assert {value.shape[1] for value in smaller.graph.inputs if str(value.name).startswith("past")} == {2}  # type: ignore[index]
    given = feeds(model, [[0, 0, 1, 1, 1], [1] * 5], 0, 9)
    less = {key: value[:, :2] if key.startswith("past") else value for key, value in given.items()}
    np.testing.assert_allclose(run(smaller, less)[0], run(model, given)[0], atol=2e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt_neox", {"head_dim": 8}, "only 2 of 8 planes are rotary"),
        ("stablelm in groups", {"head_dim": 8}, "only 4 of 8 planes are rotary"),
        ("stablelm in groups", {"heads": 4, "kv_heads": 1}, "only 4 of 8 planes are rotary"),
    ],
)
def test_heads_do_not_become_smaller(family: Any, name: str, options: Any, message: str) -> None:
    fused(model := family(name))
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        reduce(model, **options)
    assert raised.value.hint == "reduce heads, not head_dim"


def test_heads_that_are_rotated_whole_do_not_become_smaller(traced: Any) -> None:
    """Their tables are computed in the graph, so that no planes can be taken out of them."""
    fused(model := traced("Llama", num_key_value_heads=2, hidden_size=128, head_dim=32))
    with pytest.raises(UnsupportedModelError, match="a table of rotary positions, is computed in the graph"):
        reduce(model, head_dim=16)


def test_a_norm_of_each_head_is_named(traced: Any) -> None:
    model = traced("Qwen3", num_key_value_heads=2, head_dim=SIZE)
    reason = "SimplifiedLayerNormalization of each head (QK-norm) stands between queries and attention"
    assert FuseForeign()(model).report.skipped == {f"attention: {reason}": LAYERS}
    with pytest.raises(UnsupportedModelError, match="QK-norm") as raised:
        reduce(model, heads=2)
    assert "prune-ffn" in str(raised.value.hint)
