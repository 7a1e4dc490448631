"""Write a random llama checkpoint in bfloat16, sharded. usage: random_checkpoint.py FOLDER LAYERS HIDDEN INTERMEDIATE

Weights are small normal numbers, written from one block over and over: memory stays small whatever the size. Standard
library and numpy only.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

VOCABULARY, KV_HEADS, HEAD_DIM = 32000, 4, 128
SHARD_BYTES = 4 * 10**9
BLOCK = np.random.default_rng(0).standard_normal(2**23, np.float32) * 0.02
BYTES = (BLOCK.view(np.uint32) >> 16).astype("<u2").tobytes()


def shapes(layers: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a llama by name, in the order in which checkpoints have them."""
    narrow = KV_HEADS * HEAD_DIM
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(layers):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }
        result |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return result | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset > 0:
            file.write(BYTES[:offset])
            offset -= len(BYTES)


def main() -> None:
    folder, (layers, hidden, intermediate) = Path(sys.argv[1]), map(int, sys.argv[2:])
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(layers, hidden, intermediate).items():
        if 2 * sum(math.prod(known) for known in (*shards[-1].values(), shape)) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, tensors)
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
