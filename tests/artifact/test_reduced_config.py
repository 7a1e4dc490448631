"""Configurations follow structures: names of every family, lists by layer, and what no configuration can say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from onnxpress.artifact.reduced_config import Reduced, reduced_config, renewed
from onnxpress.artifact.structure import AttentionSizes, LayerSizes, Structure

HEADS = AttentionSizes(4, 4, 16)


def structure(stacks: dict[str, list[LayerSizes]] | None = None, **changes: Any) -> Structure:
    stacks = stacks or {"model.layers": layers()}
    found = Structure({name: tuple(one) for name, one in stacks.items()}, dict.fromkeys(stacks, 64), 120, 1000)
    return replace(found, **changes)


def layers(
    count: int = 4, heads: AttentionSizes = HEADS, width: int = 96, kept: list[int] | None = None
) -> list[LayerSizes]:
    return [LayerSizes(index, (heads,), width) for index in (kept if kept is not None else range(count))]


def follow(config: dict[str, Any], after: Structure, before: Structure | None = None) -> Reduced:
    return reduced_config(config, before or structure(), after)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "llama", "intermediate_size": 96}, "intermediate_size"),
        ({"model_type": "opt", "ffn_dim": 96}, "ffn_dim"),
        ({"model_type": "t5", "d_ff": 96}, "d_ff"),
        ({"model_type": "distilbert", "hidden_dim": 96}, "hidden_dim"),
        ({"model_type": "gpt2", "n_inner": None}, "n_inner"),
        ({"model_type": "gpt2"}, "n_inner"),
        ({"model_type": "falcon", "ffn_hidden_size": 96}, "ffn_hidden_size"),
        ({"model_type": "falcon"}, "ffn_hidden_size"),
    ],
)
def test_the_width_by_the_family_s_name(config: dict[str, Any], name: str) -> None:
    found = follow(config, structure({"model.layers": layers(width=48)}))
    assert found.config == {**config, name: 48}
    assert found.onnx_only == []


def test_names_that_nothing_reads_follow_where_they_have_the_value_and_stay_where_not() -> None:
    after = structure({"model.layers": layers(width=48)})
    both = follow({"model_type": "opt", "intermediate_size": 96, "ffn_dim": 96}, after)
    assert both.config == {"model_type": "opt", "intermediate_size": 48, "ffn_dim": 48}
    other = follow({"model_type": "opt", "intermediate_size": 3072, "ffn_dim": 96}, after)
    assert other.config == {"model_type": "opt", "intermediate_size": 3072, "ffn_dim": 48}


def test_a_family_without_a_name_is_onnx_only() -> None:
    found = follow({"model_type": "bloom"}, structure({"model.layers": layers(width=48)}))
    assert found.onnx_only == ["bloom has no name for feed-forward width, now 48"]
    assert found.config == {"model_type": "bloom"}


def test_layers_that_differ_are_onnx_only() -> None:
    config = {"model_type": "llama", "intermediate_size": 96}
    mixed = [*layers(2), *layers(width=48, kept=[2, 3])]
    found = follow(config, structure({"model.layers": mixed}))
    assert found.onnx_only == ["layers differ in feed-forward width: 48, 96"]
    assert found.config == config


def test_lists_with_an_entry_for_each_layer_are_cut_alike() -> None:
    config = {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "other": [1, 2, 3, 4],
    }
    found = follow(config, structure({"model.layers": layers(kept=[0, 3])}))
    assert found.config == {**config, "num_hidden_layers": 2, "layer_types": ["a", "d"]}
    assert found.onnx_only == []
    del config["layer_types"]
    found = follow(config, structure({"model.layers": layers(kept=[0, 3])}))
    assert found.onnx_only == ["layers of gemma2 take turns, and config.json has no layer_types to say which stay"]


def test_encoder_and_decoder_have_names_of_their_own() -> None:
    before = structure({"encoder.layers": layers(), "decoder.layers": layers()})
    after = structure({"encoder.layers": layers(kept=[1]), "decoder.layers": layers(width=48)})
    config = {
        "model_type": "bart",
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
    }
    found = follow(config, after, before)
    assert found.config == {**config, "encoder_layers": 1, "decoder_ffn_dim": 48}
    assert found.onnx_only == []


def test_heads_and_their_groups() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    found = follow(config, structure({"model.layers": layers(heads=AttentionSizes(2, 1, 16))}))
    assert found.config == {**config, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    found = follow(config, structure({"model.layers": layers(heads=AttentionSizes(4, 4, 8))}))
    assert found.config == {**config, "head_dim": 8}
    assert found.onnx_only == []
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4}
    found = follow(config, structure({"model.layers": layers(heads=AttentionSizes(2, 2, 16))}))
    assert found.onnx_only == ["gpt2 takes hidden size / heads for the features of a head: 64 / 2 is not 16"]


@pytest.mark.parametrize("before", [120, 110])
def test_the_vocabulary_wherever_it_is_named(before: int) -> None:
    """110: who numbers tokens anew has written it already."""
    stacks = {"vision_model.layers": layers(), "text_model.layers": layers()}
    config = {"text_config": {"vocab_size": before}, "vision_config": {"image_size": 32}, "model_type": "clip"}
    found = follow(config, structure(stacks, vocabulary=110), structure(stacks))
    assert found.config == {**config, "text_config": {"vocab_size": 110}}
    assert found.onnx_only == []


def test_a_vocabulary_without_a_name() -> None:
    found = follow({"model_type": "odd"}, structure(vocabulary=110))
    assert found.onnx_only == ["odd has no name for vocabulary, now 110"]


def test_norms_of_another_kind_are_onnx_only() -> None:
    before, after = (structure(norms=frozenset({kind})) for kind in ("LayerNorm", "RMS norm"))
    assert follow({"model_type": "opt"}, after, before).onnx_only == ["opt has LayerNorm where the graph has RMS norm"]


def test_what_did_not_change_is_left_as_it_is() -> None:
    config = {"model_type": "llama", "intermediate_size": 7, "num_hidden_layers": 5}
    assert follow(config, structure()) == Reduced(config)
    assert reduced_config({}, structure(), structure()) == Reduced({})


def test_how_layers_differ_by_now_stands_for_how_they_differed_before() -> None:
    """A search cuts in several steps: each reason is said once, as it is in the end."""
    first = ["layers differ in feed-forward width: 48, 96", "layers differ in attention heads: 2, 4", "other: 1"]
    found = renewed(first, ["layers differ in feed-forward width: 24, 48, 96", "other: 2"])
    assert found == [*first[1:], "layers differ in feed-forward width: 24, 48, 96", "other: 2"]
    assert set(renewed(first, first)) == set(first)
