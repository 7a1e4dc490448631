"""config.json, tokenizer and generation config of a .gguf, as files that transformers' Auto classes read.

transformers translates most of the metadata; what it leaves out and would change answers silently is completed here:
scaled rotary embeddings, Gemma's attention scale, the size of the vocabulary.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import BadInputError, CorruptFileError, UnsupportedModelError
from onnxpress.exporter.sources.gguf_header import Header
from onnxpress.graph.tensors import map_file

_LOCAL_SETTINGS = ("name_or_path", "is_local", "local_files_only")
"""Key of tokenizer_config.json: where this machine found the file."""

_EXPERTS: Mapping[str, Mapping[str, str]] = {
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
"""Sizes of experts that transformers does not take over, by architecture: metadata key to config key."""

_LLAMA3_ORIGINAL_POSITIONS = 8192
"""The same in every Llama 3.x; the file holds only the resulting factors, which are compared."""


def write_folder(header: Header, folder: Path) -> None:
    """Write config.json, tokenizer files, chat_template.jinja and generation_config.json into `folder`.

    Raises:
        UnsupportedModelError: an architecture, tokenizer or rotary scaling that has no translation.
    """
    from transformers import GenerationConfig

    config = translate_config(header)
    config.save_pretrained(folder)
    _save_tokenizer(header, folder)
    generation = GenerationConfig.from_model_config(config)
    generation.save_pretrained(folder)


def translate_config(header: Header) -> Any:
    """The transformers configuration (PreTrainedConfig)."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint

    supported = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    architecture = header.architecture
    known = {
        *supported,
        *(name.replace("_", "") for name in supported),
        *(name.replace("_", "-") for name in supported),
    }
    if architecture not in known:
        raise UnsupportedModelError(
            f"{header.path}: GGUF files of architecture {architecture or '(none)'} are not read",
            hint=f"known are {', '.join(supported)}; start from the safetensors checkpoint instead",
        )
    values = _quietly(header, load_gguf_checkpoint, str(header.path), return_tensors=False)["config"]
    values.pop("_model_name_or_path", None)
    values = {
        key: float(str(np.float32(value))) if isinstance(value, float) else value for key, value in values.items()
    }
    _complete(header, values)
    model_type = values.pop("model_type")
    config = AutoConfig.for_model(model_type, **values)
    if isinstance(config.pad_token_id, int) and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None  # the default of another vocabulary
    if not config.architectures:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        config.architectures = [name] if name else None
    return config


def _save_tokenizer(header: Header, folder: Path) -> None:
    from transformers import AutoTokenizer

    if "tokenizer.ggml.model" not in header.metadata:
        raise BadInputError(f"{header.path} has no tokenizer", hint="take a .gguf of a whole model, not of an adapter")
    source = header.path.resolve()
    tokenizer = _quietly(header, AutoTokenizer.from_pretrained, str(source.parent), gguf_file=source.name)
    limit = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    kept = {
        key: value
        for key, value in json.loads(settings.read_text(encoding="utf-8")).items()
        if key not in _LOCAL_SETTINGS
    }
    settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _quietly(header: Header, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call into transformers' reader: its failures as ours, its remarks about unread keys not at all."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)
    except ImportError:
        raise
    except (NotImplementedError, KeyError, ValueError, TypeError, IndexError, AttributeError, OSError) as error:
        raise UnsupportedModelError(
            f"{header.path}: transformers cannot translate this GGUF file: {type(error).__name__}: {error}",
            hint="start from the safetensors checkpoint instead",
        ) from error
    finally:
        log.setLevel(level)


def _complete(header: Header, config: dict[str, Any]) -> None:
    """Add what transformers leaves out, in place."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadInputError(f"{header.path} has no token embedding", hint="it may be an adapter or a projector")
    config["vocab_size"] = embedding.shape[0]
    arch = header.architecture
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = header.metadata.get(f"{arch}.attention.key_length")
    if head_dim is not None and arch in ("llama", "mistral", "qwen2", "qwen3"):
        config["head_dim"] = head_dim
    for key, name in _EXPERTS.get(arch, {}).items():
        if (size := header.metadata.get(f"{arch}.{key}")) is not None:
            config[name] = size
    if arch in ("gemma2", "gemma3") and isinstance(heads, int) and isinstance(width, int):
        largest = {"gemma2": 46, "gemma3": 62}[arch]  # the 27B models scale by width per head, the others by head_dim
        config["query_pre_attn_scalar"] = (
            width // heads if config.get("num_hidden_layers") == largest else config.get("head_dim", 256)
        )
    if scaling := _rope_scaling(header, config):
        theta = config.pop("rope_theta", 10000.0)
        if arch == "gemma3":  # only its global layers are scaled
            local = {"rope_type": "default", "rope_theta": 10000.0}
            config["rope_parameters"] = {
                "full_attention": {"rope_theta": theta, **scaling},
                "sliding_attention": local,
            }
        else:
            config["rope_parameters"] = {"rope_theta": theta, **scaling}


def _rope_scaling(header: Header, config: dict[str, Any]) -> dict[str, Any] | None:
    """transformers' rope parameters for a scaled rotary embedding, or None for a plain one."""
    prefix = f"{header.architecture}.rope.scaling"
    kind = header.metadata.get(f"{prefix}.type", "none")
    factor = header.metadata.get(f"{prefix}.factor", header.metadata.get(f"{header.architecture}.rope.scale_linear"))
    original = header.metadata.get(f"{prefix}.original_context_length")
    if "rope_factors_long.weight" in header.tensors:
        if original is None:
            raise UnsupportedModelError(
                f"{header.path}: scaled positions without their original length", hint="convert the model anew"
            )
        config["original_max_position_embeddings"] = original
        return {
            "rope_type": "longrope",
            "long_factor": _floats(header, "rope_factors_long.weight").tolist(),
            "short_factor": _floats(header, "rope_factors_short.weight").tolist(),
            "original_max_position_embeddings": original,
        }
    if "rope_freqs.weight" in header.tensors:
        return _llama3_scaling(header, config)
    if kind == "none" and factor in (None, 0.0, 1.0):
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor} if factor not in (None, 0.0, 1.0) else None
    if kind == "yarn" and factor and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModelError(
        f"{header.path}: rotary scaling {kind!r} is not translated",
        hint="start from the safetensors checkpoint instead",
    )


def _llama3_scaling(header: Header, config: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's scaling from its table of frequency divisors, float32 [head_dim / 2]; refused unless reproduced."""
    divisors = _floats(header, "rope_freqs.weight")
    factor = float(divisors.max(initial=1.0))
    if factor == 1.0:
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high = 1.0, 4.0
    wavelengths = 2 * np.pi * config.get("rope_theta", 10000.0) ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (_LLAMA3_ORIGINAL_POSITIONS / wavelengths - low) / (high - low)
    expected = 1 / np.clip((1 - smooth) / factor + smooth, 1 / factor, 1.0)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UnsupportedModelError(
            f"{header.path}: its rotary frequencies follow no known rule",
            hint="start from the safetensors checkpoint instead",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_POSITIONS,
    }


def _floats(header: Header, name: str) -> np.ndarray:
    info = header.tensors.get(name)
    if info is None or info.type.name != "F32" or len(info.shape) != 1:
        raise CorruptFileError(f"{header.path}: {name} is missing or not a list of float32")
    return map_file(header.path, info.offset, info.nbytes).view(np.float32)
