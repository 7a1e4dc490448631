"""A checkpoint: configuration, tokenizer files and lazy weights, whatever it came from.

`load_folder` reads Hugging Face folders; `gguf.py` turns a .gguf into one. What is given is checked before anything
else is done with it, and refused with an error that says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from onnxpress.artifact.artifact import Source
from onnxpress.errors import BadInputError, CorruptFileError, UnsafeInputError, UnsupportedModelError
from onnxpress.exporter.sources.safetensors import read_safetensors
from onnxpress.files.json_files import read_json_object
from onnxpress.graph.tensors import WeightTensor
from onnxpress.models.catalog import Pooling

_SIDECAR_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "generation_config.json",
    "*processor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "*_Pooling/config.json",
    "LICENSE*",
)
"""Files that travel with a model, by pattern; config.json is not among them: see Checkpoint.config."""

_FOREIGN_WEIGHTS = ("*.h5", "*.msgpack", "*.ckpt*", "*.pdparams", "*.pth", "*.pt", "adapter_model.*")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is not a graph yet."""

    source: Source
    config: Mapping[str, Any]
    """config.json."""
    files: Mapping[str, Path]
    """Tokenizer, generation config, chat template, … by path in the folder; not config.json."""
    folder: Path
    """Holds config.json and `files`, so that transformers' Auto classes can read it; weights only if it had them."""
    tensors: Mapping[str, WeightTensor]
    """By checkpoint name."""
    task: str | None = None
    """optimum's task name, where the catalog or the files say it."""
    pooling: Pooling | None = None
    """How a sentence encoder pools; None where nothing says that it does."""
    trust_remote_code: bool = False
    """Whether the user allowed the folder's own Python code; needed only where transformers has no class."""


def load_folder(
    folder: Path, source: Source, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Checkpoint:
    """Read a Hugging Face folder: headers only, no weights.

    Raises:
        BadInputError: config.json or the weights are missing.
        CorruptFileError: a file is truncated, damaged, or names files outside the folder.
        UnsafeInputError: pickled weights or remote code, without the flag that allows them.
        UnsupportedModelError: an architecture or a quantized format that onnxpress does not read.
    """
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"{folder} has weights but no config.json", hint="copy the config.json of the original model into it"
        )
    config = read_json_object(folder / "config.json")
    check_config(folder, config, trust_remote_code=trust_remote_code)
    return Checkpoint(
        source=source,
        config=config,
        files=find_sidecar_files(folder),
        folder=folder,
        tensors=_read_weights(folder, allow_pickle=allow_pickle),
        pooling=read_pooling(folder),
        trust_remote_code=trust_remote_code,
    )


def check_config(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse configurations of no stated type, remote code, and quantized checkpoints.

    transformers is only asked about a checkpoint that brings code: importing it takes seconds. An architecture that it
    does not know shows when the model is traced (`check_architecture`).
    """
    if not isinstance(config.get("model_type"), str):
        raise UnsupportedModelError(
            f"{folder / 'config.json'} does not say its model_type",
            hint='add the architecture, for example "model_type": "llama"',
        )
    if config.get("auto_map"):
        check_architecture(folder, config, trust_remote_code=trust_remote_code)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"{folder}: the weights are quantized already ({method or 'unknown method'})",
            hint="start from the unquantized checkpoint (BF16, F16 or F32) or from a .gguf",
        )


def check_architecture(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Refuse architectures that transformers has no class for, unless their own code may be trusted."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING_NAMES and not (config.get("auto_map") and trust_remote_code):
        if config.get("auto_map"):
            raise UnsafeInputError(
                f"{folder}: the architecture {model_type} needs Python code that comes with the checkpoint",
                hint="read that code, then allow it with --trust-remote-code",
            )
        near = get_close_matches(model_type, CONFIG_MAPPING_NAMES, n=1, cutoff=0.7)
        raise UnsupportedModelError(
            f"{folder}: unknown architecture {model_type}",
            hint=f"did you mean {near[0]}?" if near else "a newer transformers may know it",
        )


def find_sidecar_files(folder: Path) -> dict[str, Path]:
    """Tokenizer and other files that belong to the model, by path relative to `folder`, sorted."""
    found = {
        path.relative_to(folder).as_posix(): path
        for pattern in _SIDECAR_FILES
        for path in folder.glob(pattern)
        if path.is_file()
    }
    return dict(sorted(found.items()))


def _read_weights(folder: Path, *, allow_pickle: bool) -> dict[str, WeightTensor]:
    """Like transformers: one safetensors file, else shards with an index, else pickles if allowed."""
    if (single := folder / "model.safetensors").is_file():
        return {**read_safetensors(single)}
    if (index := folder / "model.safetensors.index.json").is_file():
        return _read_shards(index)
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and allow_pickle:
        from onnxpress.exporter.sources.pickles import read_pickle

        return {name: tensor for path in pickles for name, tensor in read_pickle(path).items()}
    if pickles:
        raise UnsafeInputError(
            f"{folder} holds its weights only as pickles ({pickles[0].name})",
            hint="--allow-pickle reads them with torch's restricted unpickler; converting to safetensors is safer",
        )
    others = sorted({path.name for pattern in _FOREIGN_WEIGHTS for path in folder.glob(pattern)})
    others += sorted(path.name for path in folder.glob("*.safetensors"))
    hint = "put model.safetensors, or its shards and model.safetensors.index.json, beside it"
    if "adapter_model.safetensors" in others:
        hint = "this is an adapter: merge it into its base model first (peft's merge_and_unload) and save that"
    elif others:
        hint = f"{others[0]} is not read; save the model with save_pretrained"
    raise BadInputError(f"{folder} has a config.json but no weights", hint=hint)


def _read_shards(index: Path) -> dict[str, WeightTensor]:
    """The tensors of all shards that an index names; the index is untrusted."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptFileError(f"{index} has no weight_map from names to files", hint="fetch it again")
    tensors: dict[str, WeightTensor] = {}
    for file in sorted(set(weight_map.values())):
        if file != PurePosixPath(file).name or "\\" in file or file in ("", ".", ".."):
            raise UnsafeInputError(
                f"{index} names a shard outside its folder: {file!r}", hint="do not use this checkpoint"
            )
        shard = index.parent / file
        if not shard.is_file():
            raise CorruptFileError(f"{index.parent} lacks the shard {file}", hint="the download is incomplete")
        tensors.update(read_safetensors(shard))
    if lost := [name for name in weight_map if name not in tensors]:
        raise CorruptFileError(
            f"{index.parent}: {len(lost)} tensors of the index are in no shard: {', '.join(lost[:3])}",
            hint="the index and the shards do not belong together; fetch both again",
        )
    return tensors


def read_pooling(folder: Path) -> Pooling | None:
    """How a sentence-transformers folder pools (modules.json); None if it is none, or does something else besides."""
    path = folder / "modules.json"
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        modules = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in listed}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is not a list of modules: {error}", hint="fetch it again") from error
    if "Pooling" not in modules or not set(modules) <= {"Transformer", "Pooling", "Normalize"}:
        return None
    place = PurePosixPath(modules["Pooling"])
    if place.is_absolute() or ".." in place.parts:
        raise UnsafeInputError(f"{path} points outside its folder: {place}", hint="do not use this checkpoint")
    if not (folder / place / "config.json").is_file():
        return None
    chosen = list(_pooling_modes(read_json_object(folder / place / "config.json")))
    if len(chosen) != 1 or chosen[0] is None:
        return None
    return Pooling(mode=chosen[0], normalize="Normalize" in modules)


def _pooling_modes(config: Mapping[str, Any]) -> Iterator[Any]:
    """The modes that a pooling config switches on, as Pooling calls them; unknown ones are passed through as None."""
    known = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "lasttoken": "last"}
    for key, value in config.items():
        if key.startswith("pooling_mode_") and value is True:
            yield known.get(key.removeprefix("pooling_mode_"))
