"""Tiny random checkpoints of every architecture that the exporter promises, built from their transformers configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_COMMON = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": 6},
    "qwen2": {**_GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": {**_GROUPED, "head_dim": 32},
    "gemma2": {**_GROUPED, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": 6,
        "num_hidden_layers": 8,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {**_GROUPED},
    "gpt2": {
        "vocab_size": 120,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": {**_COMMON, "hidden_size": 256, "rotary_pct": 0.25},
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"vocab_size": 120, "hidden_size": 64, "n_head": 4, "n_layer": 4, "bos_token_id": 1, "eos_token_id": 2},
    "falcon": {**_COMMON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "olmo2": {**_GROUPED},
    "granite": {
        **_GROUPED,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "stablelm": {**_GROUPED, "hidden_size": 128, "partial_rotary_factor": 0.5},
    "starcoder2": {**_GROUPED, "sliding_window": 6},
    "smollm3": {**_GROUPED, "no_rope_layer_interval": 2},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
}
"""Architectures whose only task here is text generation."""


def config_of(model_type: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    settings = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}[model_type]
    return CONFIG_MAPPING[model_type](**{**settings, **changes})


def save(config: Any, model_class: Any, folder: Path, *, seed: int = 0) -> Any:
    """A random checkpoint in `folder`; returns the torch model, in float32 and eval mode, with weights large enough that
    attention is far from uniform."""
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # computed, such as sinusoidal positions
                continue
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "norm" in name or "ln" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.1)
    model.eval()
    model.save_pretrained(folder)
    return model

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**_COMMON, "type_vocab_size": 2},
    "roberta": {**_COMMON, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0},
    "xlm-roberta": {**_COMMON, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0},
    "distilbert": {"vocab_size": 120, "dim": 64, "hidden_dim": 96, "n_heads": 4, "n_layers": 4, "max_position_embeddings": 64},
    "mpnet": {**_COMMON, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0},
    "electra": {**_COMMON, "embedding_size": 32},
    "albert": {**_COMMON, "embedding_size": 32},
    "deberta-v2": {**_COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0},
    "modernbert": {**_COMMON, "global_attn_every_n_layers": 3, "num_hidden_layers": 6, "local_attention": 8},
    "nomic_bert": {**_COMMON, "type_vocab_size": 2},
    "vit": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8},
    "wav2vec2": {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4, "conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    "clip": {
        "text_config": {**_COMMON, "eos_token_id": 119},
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8},
        "projection_dim": 48,
    },
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 120, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 4, "decoder_start_token_id": 0},
    "bart": {"vocab_size": 120, "d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64},
    "marian": {"vocab_size": 120, "d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 0},
    "whisper": {"vocab_size": 120, "d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_source_positions": 30, "max_target_positions": 40, "num_mel_bins": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
}
