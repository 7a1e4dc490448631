"""ONNX files made by anyone: which graphs there are, and the configuration and tokenizer files beside them.

Recognised are a single file, the Hugging Face layout (`model.onnx`, or the triple of an encoder-decoder, in the folder
or in its `onnx/`), and onnxruntime-genai's (genai_config.json names the files). The graphs themselves are read and
checked by `onnxpress.graph.io`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from onnxpress.artifact.artifact import Source
from onnxpress.errors import BadInputError, CorruptFileError, UnsafeInputError
from onnxpress.exporter.sources.checkpoint import find_sidecar_files
from onnxpress.files.json_files import read_json_object

_TRIPLE = ("encoder_model", "decoder_model", "decoder_with_past_model", "decoder_model_merged")
"""Files of an encoder-decoder as optimum names them; the first two are the least."""


@dataclass(frozen=True)
class OnnxSource:
    """Graphs that exist already."""

    source: Source
    graphs: Mapping[str, Path]
    """By name: `model`; of encoder-decoders `encoder_model`, `decoder_model`, `decoder_with_past_model`."""
    layout: Literal["file", "huggingface", "genai"]
    config: Mapping[str, Any]
    """config.json; what genai_config.json says of it where there is none, which is how the genai builder leaves it."""
    files: Mapping[str, Path]
    """Tokenizer and other files by name; not config.json."""
    folder: Path
    """Where config.json and `files` were looked for."""
    genai_config: Mapping[str, Any] | None = None


def load_onnx_file(path: Path, source: Source) -> OnnxSource:
    """One .onnx file; its sidecar files are beside it, or in the folder above when it lies in an `onnx/`."""
    if path.stat().st_size == 0:
        raise CorruptFileError(f"{path} is empty", hint="export or fetch it again")
    return _with_sidecar_files({"model": path}, "file", path.parent, source)


def holds_onnx(folder: Path) -> bool:
    """Whether a folder has graphs in it or in its `onnx/`."""
    return any(folder.glob("*.onnx")) or any((folder / "onnx").glob("*.onnx"))


def load_onnx_folder(folder: Path, source: Source) -> OnnxSource:
    """The graphs of a folder.

    Raises:
        BadInputError: several graphs and nothing that says which is the model.
        CorruptFileError: genai_config.json is damaged or names a file that is not there.
        UnsafeInputError: genai_config.json names a file outside the folder.
    """
    if (folder / "genai_config.json").is_file():
        return _load_genai(folder, source)
    for place in (folder, folder / "onnx"):
        stems = {path.stem: path for path in sorted(place.glob("*.onnx"))}
        if "encoder_model" in stems and ("decoder_model" in stems or "decoder_model_merged" in stems):
            graphs = {stem: stems[stem] for stem in _TRIPLE if stem in stems}
            return _with_sidecar_files(graphs, "huggingface", folder, source)
        if chosen := stems.get("model") or (next(iter(stems.values())) if len(stems) == 1 else None):
            return _with_sidecar_files({"model": chosen}, "huggingface", folder, source)
        if stems:
            raise BadInputError(
                f"{place} holds several graphs and no model.onnx: {', '.join(sorted(stems))}",
                hint=f"name the file, for example {next(iter(stems.values()))}",
            )
    raise BadInputError(f"{folder} holds no .onnx file", hint="name the file or the folder that it is in")


def _load_genai(folder: Path, source: Source) -> OnnxSource:
    config = read_json_object(folder / "genai_config.json")
    parts = config.get("model")
    named = {
        part: description["filename"]
        for part, description in (parts.items() if isinstance(parts, dict) else ())
        if isinstance(description, dict) and isinstance(description.get("filename"), str)
    }
    if not named:
        raise CorruptFileError(f"{folder / 'genai_config.json'} names no graph", hint="it may be truncated")
    graphs: dict[str, Path] = {}
    for part, name in named.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name:
            raise UnsafeInputError(
                f"{folder / 'genai_config.json'} names a file outside its folder: {name!r}",
                hint="do not use this model",
            )
        if not (folder / place).is_file():
            raise CorruptFileError(f"{folder} lacks {name}, which genai_config.json names", hint="fetch it again")
        graphs["model" if part == "decoder" and len(named) == 1 else f"{part}_model"] = folder / place
    return _with_sidecar_files(graphs, "genai", folder, source, config)


def _config_of(genai_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes and special tokens of a decoder under the names that config.json has for them."""
    model = genai_config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        return {}
    names = {
        "model_type": model.get("type"),
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": model.get("context_length"),
        "bos_token_id": model.get("bos_token_id"),
        "eos_token_id": model.get("eos_token_id"),
        "pad_token_id": model.get("pad_token_id"),
        "hidden_size": decoder.get("hidden_size"),
        "head_dim": decoder.get("head_size"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
    }
    return {name: value for name, value in names.items() if value is not None}


def _with_sidecar_files(
    graphs: Mapping[str, Path],
    layout: Literal["file", "huggingface", "genai"],
    folder: Path,
    source: Source,
    genai_config: Mapping[str, Any] | None = None,
) -> OnnxSource:
    if folder.name == "onnx" and not (folder / "config.json").is_file() and (folder.parent / "config.json").is_file():
        folder = folder.parent
    path = folder / "config.json"
    config = read_json_object(path) if path.is_file() else _config_of(genai_config or {})
    return OnnxSource(source, graphs, layout, config, find_sidecar_files(folder), folder, genai_config)
