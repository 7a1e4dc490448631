"""The fused operators that the exporter writes into a traced graph.

Each function takes and returns torch tensors; it writes one ONNX node into the graph being recorded (see `recorder.py`)
instead of computing anything. `onnxpress::Linear` and `onnxpress::Experts` are ours: placeholders for products with
parameters, lowered once parameters are bound to the checkpoint (see `binding.py`), so that no weight is ever
rearranged by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from onnxpress.exporter.tracing.lowering import PLACEHOLDERS
from onnxpress.exporter.tracing.recorder import active_recorder
from onnxpress.graph.conventions import MICROSOFT


def linear(states: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Tensor:
    """states [..., in] times weight ([out, in], or [in, out] where `transposed`) plus bias [out]: one placeholder
    node."""
    out_features = weight.shape[1 if transposed else 0]
    inputs = [states, weight] if bias is None else [states, weight, bias]
    output = (states.dtype, [*states.shape[:-1], out_features])
    return active_recorder().node(PLACEHOLDERS, "Linear", inputs, {"transposed": int(transposed)}, [output])[0]


def experts(states: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, *, k: int, normalized: bool) -> Tensor:
    """A mixture of experts: for each token the sum over its k likeliest experts of probability · down(silu(gate) · up).

    states [tokens, hidden]; logits [tokens, experts]; gate_up [experts, 2 · inner, hidden], gate above up; down
    [experts, hidden, inner]; `normalized`: the k probabilities are made to sum to one. One placeholder node.
    """
    attributes = {"k": k, "normalized": int(normalized)}
    output = (states.dtype, states.shape)
    return active_recorder().node(PLACEHOLDERS, "Experts", [states, logits, gate_up, down], attributes, [output])[0]


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """SimplifiedLayerNormalization over the last axis, statistics in float32 (onnxruntime's name of RMSNorm)."""
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    output = (states.dtype, states.shape)
    return active_recorder().node("", "SimplifiedLayerNormalization", [states, weight], attributes, [output])[0]


def rotary_embedding(
    states: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, rotary_dim: int
) -> Tensor:
    """com.microsoft::RotaryEmbedding on states [batch, heads, length, head_dim]; cos, sin [positions, rotary_dim /
    2]."""
    attributes: dict[str, Any] = {"interleaved": int(interleaved)}
    if rotary_dim != states.shape[-1]:
        attributes |= {"rotary_embedding_dim": rotary_dim, "num_heads": states.shape[1]}
    inputs = [states, position_ids, cos, sin]
    output = (states.dtype, states.shape)
    return active_recorder().node(MICROSOFT, "RotaryEmbedding", inputs, attributes, [output])[0]


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    rotary: tuple[Tensor, Tensor, Tensor] | None,
    bias: Tensor | None,
    attributes: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """com.microsoft::GroupQueryAttention: causal attention that appends to the cache and rotates by itself.

    query [batch, heads, length, head_dim]; key, value [batch, kv_heads, length, head_dim]; past key and value [batch,
    kv_heads, past_length, head_dim]; lengths (seqlens_k int32 [batch], total_sequence_length int32 []); rotary (cos,
    sin, position_ids); bias [1 or batch, 1 or heads, length, total_length], added to the scores. Returns output
    [batch, length, heads, head_dim], present key, present value.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    total = past[0].shape[2] + length
    cos, sin, position_ids = rotary if rotary is not None else (None, None, None)
    inputs: Sequence[Tensor | None] = [
        *(_merge_heads(states) for states in (query, key, value)),
        *past,
        *lengths,
        cos,
        sin,
        position_ids,
        bias,
    ]
    present = (query.dtype, (batch, kv_heads, total, head_dim))
    output, present_key, present_value = active_recorder().node(
        MICROSOFT,
        "GroupQueryAttention",
        inputs,
        {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": int(rotary is not None), **attributes},
        [(query.dtype, (batch, length, heads * head_dim)), present, present],
    )
    return output.view(batch, length, heads, head_dim), present_key, present_value


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """com.microsoft::MultiHeadAttention, not causal by itself: everything that may not be seen is in `bias`.

    query [batch, heads, length, head_dim]; key [batch, heads, kv_length, head_dim], value likewise (its head size may
    differ); bias [1 or batch, 1 or heads, length, kv_length]. Returns [batch, length, heads, value_head_dim].
    """
    batch, heads, length, _ = query.shape
    value_dim = value.shape[-1]
    (output,) = active_recorder().node(
        MICROSOFT,
        "MultiHeadAttention",
        [_merge_heads(query), _merge_heads(key), _merge_heads(value), None, None, bias],
        {"num_heads": heads, "scale": scale},
        [(query.dtype, (batch, length, heads * value_dim))],
    )
    return output.view(batch, length, heads, value_dim)


def _merge_heads(states: Tensor) -> Tensor:
    """[batch, heads, length, head_dim] -> [batch, length, heads * head_dim]."""
    batch, heads, length, head_dim = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * head_dim)


def token_positions(attention_mask: Tensor) -> Tensor:
    """Positions of all tokens, int64 [batch, total length], counted over attended tokens so that padding is right."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def cache_positions(attention_mask: Tensor, past_length: int | torch.SymInt) -> Tensor:
    """Positions to rotate the new tokens to when GroupQueryAttention rotates, int64 [batch, length].

    onnxruntime rotates a prompt to 0, 1, … whatever positions it is given (it adds the very first one), and a later
    token to the position given. Rotations are relative, so each row may count from any start: from its first attended
    token's place in the cache. Then prompt and later tokens agree, whichever side a row is padded on. Padding is put
    at 0.
    """
    start = attention_mask.argmax(-1, keepdim=True)
    positions = (start + attention_mask.cumsum(-1) - 1) * attention_mask
    return positions[:, past_length:]
