"""Write a Hugging Face Llama as a float32 GGUF, for llama.cpp's quantizer. usage: write_gguf.py CHECKPOINT FILE

Without a tokenizer: contenders are fed with token ids. Runs in onnxpress's environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a rotary projection [heads x dim, width] from halves (x, x + dim / 2) to neighbours (2 x, 2 x + 1)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def main() -> None:
    checkpoint, file = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise SystemExit(f"{checkpoint} is a {config['model_type']}; only llama is written here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        layer, _, inner = name.removeprefix("model.layers.").partition(".")
        stem = (inner if layer.isdigit() else name).removesuffix(".weight")
        prefix = f"blk.{layer}." if layer.isdigit() else ""
        if stem.endswith(("q_proj", "k_proj")):
            weight = interleave(weight, heads if stem.endswith("q_proj") else kv_heads)
        writer.add_tensor(f"{prefix}{NAMES[stem]}.weight", np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
