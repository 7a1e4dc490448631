"""The content of genai_config.json; tests/clients runs onnxruntime-genai on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from onnxpress.artifact.genai_config import genai_config, write_genai_config

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(layers: int = 2, rows: int = 4096, operator: str = "GroupQueryAttention", heads: int | str = 2) -> ir.Model:
    """The signature of an exported decoder, with one node per layer that reads the cache."""

    def values(prefix: str, length: str) -> list[str]:
        shape = f"float[batch_size, {heads}, {length}, 8]"
        return [f'{shape} "{prefix}.{i}.{kind}"' for i in range(layers) for kind in ("key", "value")]

    inputs = ", ".join(["int64[batch_size, sequence_length] input_ids", *values("past_key_values", "past_length")])
    outputs = ", ".join(["float[batch_size, sequence_length, 50] logits", *values("present", "total_sequence_length")])
    nodes = "\n".join(
        f'h{i + 1}, "present.{i}.key", "present.{i}.value" = com.microsoft.{operator} <num_heads = 4, kv_num_heads = 2>'
        f'(h{i}, h{i}, h{i}, "past_key_values.{i}.key", "past_key_values.{i}.value", lengths, total, cosines, sines)'
        for i in range(layers)
    )
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g ({inputs}, int64[batch_size, total_sequence_length] attention_mask, float[{rows}, 4] cosines,
           float[{rows}, 4] sines, int32[batch_size] lengths, int32 total) => ({outputs}) {{
            h0 = Cast <to = 1> (input_ids)
            {nodes}
            logits = Identity (h{layers})
        }}"""
    )


def made(model: ir.Model | None = None, generation: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    content = genai_config(model or decoder(), "onnx/model_q4.onnx", CONFIG | changes, generation or {})
    assert content is not None
    return content


def test_the_graph_is_described_by_its_own_inputs() -> None:
    content = made()
    section = content["model"]["decoder"]
    assert section["filename"] == "onnx/model_q4.onnx"
    assert (section["num_hidden_layers"], section["num_key_value_heads"], section["head_size"]) == (2, 2, 8)
    assert section["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert content["search"] == {"max_length": 2048, "past_present_share_buffer": True}
    assert (content["model"]["bos_token_id"], content["model"]["eos_token_id"]) == (1, [2])


@pytest.mark.parametrize(
    ("model_type", "expected"), [("llama", "llama"), ("qwen3", "qwen3"), ("stablelm", "decoder"), ("gpt2", "decoder")]
)
def test_types_that_genai_lacks_become_the_generic_one(model_type: str, expected: str) -> None:
    assert made(model_type=model_type)["model"]["type"] == expected


def test_a_cache_read_by_anything_else_is_not_shared() -> None:
    assert made(decoder(operator="MultiHeadAttention"))["search"]["past_present_share_buffer"] is False


def test_rotary_tables_limit_the_context() -> None:
    content = made(decoder(rows=512))
    assert content["model"]["context_length"] == 512
    assert content["search"]["max_length"] == 512


def test_generation_settings_win_and_are_kept() -> None:
    content = made(generation={"eos_token_id": [7, 2], "pad_token_id": 9, "temperature": 0.6, "do_sample": True})
    assert content["model"]["eos_token_id"] == [7, 2]
    assert content["model"]["pad_token_id"] == 9
    assert (content["search"]["temperature"], content["search"]["do_sample"]) == (0.6, True)


def test_the_token_that_ends_a_turn_is_added(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 5, "content": "<|im_end|>"}]}))
    path = write_genai_config(tmp_path, decoder(), "onnx/model.onnx", CONFIG)
    assert path is not None
    assert json.loads(path.read_text())["model"]["eos_token_id"] == [2, 5]


def test_session_options_keep_their_types() -> None:
    options = {"session.intra_op.allow_spinning": "1", "enable_mem_pattern": "0", "graph_optimization_level": "all"}
    content = genai_config(decoder(), "m.onnx", CONFIG, {}, session_options=options)
    assert content is not None
    section = content["model"]["decoder"]["session_options"]
    assert section["session.intra_op.allow_spinning"] == "1"
    assert section["enable_mem_pattern"] is False
    assert section["graph_optimization_level"] == "ORT_ENABLE_ALL"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (decoder(layers=0), CONFIG),
        (decoder(heads="kv_heads"), CONFIG),
        (decoder(), {**CONFIG, "eos_token_id": None}),
    ],
    ids=["no cache", "free number of heads", "no end token"],
)
def test_nothing_is_written_for_what_genai_cannot_run(model: ir.Model, config: dict[str, Any], tmp_path: Path) -> None:
    assert write_genai_config(tmp_path, model, "onnx/model.onnx", config) is None
    assert not list(tmp_path.iterdir())
