"""Tiny random .gguf files: a transformers model's parameters under llama.cpp's names, with a byte-level vocabulary.

Values are random, so they need no meaning: tests compare our reading of the file with transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TOKENS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(0x21, 0x7F)), "Ġ", "he", "ll", "hell", "hello", "ĠĠ"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ"]


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Write `tensors` (float32, by name in the file), quantized as `types` says; metadata keys get the architecture."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.license", "mit")
    for key, value in metadata.items():
        key = key if key.startswith("general.") else f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_string("tokenizer.chat_template", "{{ messages[0]['content'] }}</s>")
    for name, array in tensors.items():
        kind = (types or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, stored(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(array: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A tensor's bytes; of K-quants, which gguf cannot make, any that have its float16 steps."""
    if not kind.name.endswith("_K"):
        return gguf.quants.quantize(array, kind)
    generator = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = generator.integers(0, 256, (array.size // block, size)).astype(np.uint8)
    steps = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for place, step in zip(steps, (1e-4, 8e-4), strict=False):
        halves = (step * generator.uniform(1, 2, len(data))).astype(np.float16)
        data[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    return data.reshape(*array.shape[:-1], -1)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal float32 values."""
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def decoder_shapes(
    *, layers: int = 2, width: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, inner: int = 96
) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of a Llama-like decoder without an own head."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), width), "output_norm.weight": (width,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_q.weight": (heads * head_dim, width),
            f"blk.{i}.attn_k.weight": (kv_heads * head_dim, width),
            f"blk.{i}.attn_v.weight": (kv_heads * head_dim, width),
            f"blk.{i}.attn_output.weight": (width, heads * head_dim),
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.ffn_gate.weight": (inner, width),
            f"blk.{i}.ffn_up.weight": (inner, width),
            f"blk.{i}.ffn_down.weight": (width, inner),
        }
    return shapes


def decoder_metadata(**more: Any) -> dict[str, Any]:
    """The metadata that goes with `decoder_shapes`."""
    return {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 16,
        **more,
    }
