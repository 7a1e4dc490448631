"""genai_config.json: how onnxruntime-genai finds the graph of a decoder, its cache and its special tokens.

Specification: https://onnxruntime.ai/docs/genai/reference/config.html; names of model types and what the runtime does
with padding and shared caches were checked with version 0.18:

* batches are padded on the right, trailing pads are masked, and every row goes on from its last real token;
* with `past_present_share_buffer` past and present are one buffer [batch, kv_heads, max_length, head_dim], so nothing
  but GroupQueryAttention may read the past, and nothing may take its length from its shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxpress.runtime.session_options import NUMBERS

FILE = "genai_config.json"

MODEL_TYPES = frozenset(
    "chatglm ernie4_5 gemma gemma2 gemma3_text gptoss granite internlm2 llama mistral nemotron olmo phi phi3 phi3small "
    "phimoe qwen2 qwen3 smollm3".split()
)
"""Decoders that onnxruntime-genai knows by the name transformers gives them. `gpt2` is missing on purpose: under that
name the runtime wants keys and values in one tensor."""

GENERIC_TYPE = "decoder"
"""What it calls any other decoder with the usual inputs and outputs."""

MAX_LENGTH = 2048
"""Default of `search.max_length`: a shared cache is allocated at this length before the first token."""

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_sequence_length")
_LAYER_NAMES = {
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value",
}
_SEARCH_NAMES = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")
_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def write_genai_config(
    folder: Path,
    model: ir.Model,
    filename: str,
    config: Mapping[str, Any],
    session_options: Mapping[str, str] | None = None,
) -> Path | None:
    """Write `folder`/genai_config.json for the decoder `model`, stored at `filename` relative to `folder`.

    Reads generation_config.json, tokenizer_config.json and tokenizer.json from `folder` where they are. Returns None,
    and writes nothing, if onnxruntime-genai cannot run such a graph (see `genai_config`).
    """
    generation = _read(folder / "generation_config.json")
    content = genai_config(model, filename, config, generation, _turn_end(folder), session_options)
    if content is None:
        return None
    path = folder / FILE
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def genai_config(
    model: ir.Model,
    filename: str,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    turn_end: int | None = None,
    session_options: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """The content of genai_config.json.

    config, generation: config.json and generation_config.json of the checkpoint. turn_end: the token that the tokenizer
    calls the end, which chat models write after each turn and some configurations forget. session_options: as in
    profiles.

    None for what the runtime has no place for: graphs without `input_ids`, logits or a cache, caches whose heads
    differ between layers, models without an end token.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name for value in model.graph.outputs}
    shapes = _cache_shapes(inputs)
    ends = _end_tokens(config, generation, turn_end)
    if "input_ids" not in inputs or "logits" not in outputs or len(set(shapes)) != 1 or not ends:
        return None
    kv_heads, head_dim = shapes[0]
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    context = _context_length(model, config)
    pad = _first(generation.get("pad_token_id"), config.get("pad_token_id"), ends[0])
    heads = int(_first(config.get("num_attention_heads"), config.get("n_head"), config.get("num_heads"), kv_heads))
    model_type = str(config.get("model_type", ""))
    content: dict[str, Any] = {
        "model": {
            "type": model_type if model_type in MODEL_TYPES else GENERIC_TYPE,
            "context_length": context,
            "vocab_size": int(config["vocab_size"]),
            "eos_token_id": ends,
            "pad_token_id": pad,
            "decoder": {
                "filename": filename,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [],
                    **_session_options(session_options or {}),
                },
                "head_size": head_dim,
                "hidden_size": int(_first(config.get("hidden_size"), config.get("n_embd"), heads * head_dim)),
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": len(shapes),
                "inputs": names | {key: name for key, name in _LAYER_NAMES.items() if key.startswith("past")},
                "outputs": {"logits": "logits"}
                | {key: name for key, name in _LAYER_NAMES.items() if key.startswith("present")},
            },
        },
        "search": {
            "max_length": min(context, MAX_LENGTH),
            "past_present_share_buffer": _shares_buffer(inputs.values()),
            **{name: generation[name] for name in _SEARCH_NAMES if generation.get(name) is not None},
        },
    }
    begin = _first(generation.get("bos_token_id"), config.get("bos_token_id"))
    if isinstance(begin, int):
        content["model"]["bos_token_id"] = begin
    return content


def _cache_shapes(inputs: Mapping[str | None, ir.Value]) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each layer's cache, in order; empty if a layer is missing or has free dimensions."""
    shapes: list[tuple[int, int]] = []
    while (key := inputs.get(_LAYER_NAMES["past_key_names"] % len(shapes))) is not None:
        value = inputs.get(_LAYER_NAMES["past_value_names"] % len(shapes))
        if key.shape is None or value is None or value.shape is None:
            return []
        heads, width = key.shape[1], key.shape[3]
        if not (isinstance(heads, int) and isinstance(width, int)):
            return []
        if (value.shape[1], value.shape[3]) != (heads, width):
            return []
        shapes.append((heads, width))
    caches = sum(1 for name in inputs if name is not None and name.startswith("past"))
    return shapes if caches == 2 * len(shapes) else []


def _shares_buffer(inputs: Iterable[ir.Value]) -> bool:
    """Tell whether every cache is read by GroupQueryAttention alone: it writes present into the memory of past."""
    caches = [value for value in inputs if value.name is not None and value.name.startswith("past_key_values.")]
    return all(node.op_type == "GroupQueryAttention" for value in caches for node, _ in value.uses())


def _context_length(model: ir.Model, config: Mapping[str, Any]) -> int:
    """Tokens that the model takes: what config.json says, or fewer if the graph's rotary tables end earlier."""
    lengths = [int(config[name]) for name in _CONTEXT_NAMES if config.get(name)][:1]
    for node in model.graph:
        table = node.inputs[7] if node.op_type == "GroupQueryAttention" and len(node.inputs) > 7 else None
        if table is not None and table.shape is not None and isinstance(rows := table.shape[0], int):
            lengths.append(rows)
    return min(lengths, default=MAX_LENGTH)


def _end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any], turn_end: int | None) -> list[int]:
    found = _first(generation.get("eos_token_id"), config.get("eos_token_id"))
    ends = [found] if isinstance(found, int) else list(found or [])
    return ends if turn_end is None or turn_end in ends else [*ends, turn_end]


def _turn_end(folder: Path) -> int | None:
    """The id of the tokenizer's `eos_token`."""
    token = _read(folder / "tokenizer_config.json").get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    for added in _read(folder / "tokenizer.json").get("added_tokens", []):
        if added["content"] == name:
            return int(added["id"])
    return None


def _session_options(options: Mapping[str, str]) -> dict[str, Any]:
    """A profile's options as onnxruntime-genai writes them: attributes typed, configuration entries as strings.

    `enable_mem_reuse` has no place there and is left out; nor has the level `layout`, which is nearest to all.
    """
    typed: dict[str, Any] = {}
    for name, value in options.items():
        if name == "graph_optimization_level":
            typed[name] = _LEVELS.get(value, "ORT_ENABLE_ALL")
        elif "." in name:
            typed[name] = str(value)
        elif name in ("enable_cpu_mem_arena", "enable_mem_pattern"):
            typed[name] = value == "1"
        elif name in NUMBERS:
            typed[name] = int(value)
    return typed


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
