"""The artifact on disk: one layout that every client loads unmodified.

artifact.json                  see onnxpress.artifact.manifest
onnx/model{suffix}.onnx        suffixes as transformers.js reads them: "" fp32, _fp16, _quantized (8 bits), _q4, _q4f16
onnx/model{suffix}.onnx_data   its weights, where they are too many for one file
                               of encoder-decoders: encoder_model, decoder_model, decoder_with_past_model, and
                               decoder_model_merged, whose .onnx_data has the weights of all three decoders
config.json generation_config.json genai_config.json tokenizer*.json chat_template.jinja
golden/                        inputs and expected outputs for a self-test
README.md report.html          the model card; the same with pictures
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir

from onnxpress.artifact import manifest
from onnxpress.artifact.artifact import Artifact, Source, Step
from onnxpress.errors import CorruptFileError, VerificationError
from onnxpress.graph.conventions import DECODER, DECODER_MERGED, DECODER_WITH_PAST
from onnxpress.graph.io import load_graph, save_graph, save_graphs
from onnxpress.graph.merged_decoder import merge_decoders, share_weights
from onnxpress.graph.storage import stored
from onnxpress.graph.tensors import FileTensor, concrete_shape

GRAPHS = "onnx"
CARD, REPORT = "README.md", "report.html"
SINGLE_FILE_BYTES = 64 * 2**20
"""Up to here weights stay in the .onnx file; more go beside it, where sessions map them instead of reading them."""

_TRANSFORMERS_JS_DTYPES = {"": "fp32", "_fp16": "fp16", "_quantized": "q8", "_q4": "q4", "_q4f16": "q4f16"}
_ONE_BYTE = (ir.DataType.INT8, ir.DataType.UINT8)
_HALF_BYTE = (ir.DataType.INT4, ir.DataType.UINT4)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def write_graphs(
    graphs: Mapping[str, ir.Model], folder: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, Path]:
    """Write each graph as onnx/{name}{suffix}.onnx below `folder`; returns the paths by graph name.

    The decoders of an encoder-decoder are written merged as well; the three share one file of weights.
    """
    (folder / GRAPHS).mkdir(exist_ok=True)
    ending = suffix(*graphs.values())
    decoders = {name: graphs[name] for name in (DECODER, DECODER_WITH_PAST) if name in graphs}
    if len(decoders) == 2:
        share_weights(decoders.values())
        decoders[DECODER_MERGED] = merge_decoders(*decoders.values())
    else:
        decoders = {}
    paths = {name: folder / GRAPHS / f"{name}{ending}.onnx" for name in [*graphs, *decoders]}
    for name in graphs.keys() - decoders.keys():
        data = f"{paths[name].name}_data" if weight_bytes(graphs[name]) > SINGLE_FILE_BYTES else None
        save_graph(graphs[name], paths[name], external_data=data, progress=progress)
    if decoders:
        data = f"{paths[DECODER_MERGED].name}_data"  # the only name that transformers.js looks for
        save_graphs({paths[name]: model for name, model in decoders.items()}, external_data=data, progress=progress)
    return paths


def write_sidecar_files(artifact: Artifact, folder: Path) -> None:
    """Copy the sidecar files and write config.json, with what transformers.js has to be told about the graphs."""
    for name, path in artifact.files.items():
        target = folder / _inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    _inline_chat_template(folder)
    _unpack_processor(folder)
    if artifact.config:
        write_json(folder / "config.json", {**artifact.config, "transformers.js_config": _transformers_js(folder)})


def _inline_chat_template(folder: Path) -> None:
    """Repeat chat_template.jinja in tokenizer_config.json, the only place where transformers.js looks for it."""
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file() and settings.is_file():
        content = json.loads(settings.read_text(encoding="utf-8"))
        write_json(settings, {**content, "chat_template": template.read_text(encoding="utf-8")})


def _unpack_processor(folder: Path) -> None:
    """Write preprocessor_config.json, which transformers.js reads, from the parts of transformers 5's processor."""
    whole, part = folder / "processor_config.json", folder / "preprocessor_config.json"
    if whole.is_file() and not part.exists():
        content = json.loads(whole.read_text(encoding="utf-8"))
        parts = [content[key] for key in ("image_processor", "feature_extractor") if isinstance(content.get(key), dict)]
        if parts:
            merged = {key: value for one in parts for key, value in one.items()}
            name = content.get("processor_class")
            write_json(part, merged | ({"processor_class": name} if name else {}))


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of two, and a line break at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def graph_paths(folder: Path) -> dict[str, Path]:
    """Find the graphs of an artifact, by graph name: the file's without the suffix.

    Raises CorruptFileError if there is none.
    """
    paths = {}
    for path in sorted((folder / GRAPHS).glob("*.onnx")):
        name = path.stem
        for ending in filter(None, _TRANSFORMERS_JS_DTYPES):
            name = name.removesuffix(ending)
        paths[name] = path
    if not paths:
        raise CorruptFileError(f"{folder} has no graph in {GRAPHS}/", hint="build the artifact again")
    return paths


def read_artifact(folder: Path) -> Artifact:
    """Read the artifact in `folder`, its weights lazy. Raises what `manifest.read` and `load_graph` raise.

    A merged decoder is left out: it is made of the others again when they are written.
    """
    record = manifest.read(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    config.pop("transformers.js_config", None)
    made_here = {"config.json", "genai_config.json", CARD, REPORT}
    files = {
        name: folder / _inside(name)
        for name in record.files
        if name not in made_here and PurePosixPath(name).parts[0] not in (GRAPHS, "golden", "app")
    }
    for name, path in files.items():
        if not path.is_file():
            raise VerificationError(f"{name} is missing from {folder}", hint="build the artifact again")
    return Artifact(
        task=record.task,
        graphs={name: load_graph(path) for name, path in graph_paths(folder).items() if name != DECODER_MERGED},
        config=config,
        files=files,
        source=Source(**record.source.model_dump()),
        export=record.export,
        history=tuple(Step(**step.model_dump()) for step in record.steps),
    )


def suffix(*models: ir.Model) -> str:
    """Return the ending that transformers.js gives the format of most parameters."""
    formats = sum(map(weight_formats, models), Counter[str]())
    main = max(formats, key=lambda name: formats[name], default="float32")
    if main == "4-bit":
        return "_q4f16" if formats["float16"] > formats["float32"] else "_q4"
    return {"8-bit": "_quantized", "float16": "_fp16"}.get(main, "")


def weight_formats(model: ir.Model) -> Counter[str]:
    """Count parameters by `weight_format`."""
    formats: Counter[str] = Counter()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if (name := weight_format(value)) and value.const_value is not None:
                packed = 2 if name == "4-bit" and value.const_value.dtype in _ONE_BYTE else 1
                formats[name] += value.const_value.size * packed
    return formats


def weight_format(value: ir.Value) -> str | None:
    """Return `4-bit`, `8-bit`, `float16` or `float32`; None for other initializers.

    Packed 4-bit weights look like bytes: the `bits` of the operator that reads them tells.
    """
    dtype = value.const_value.dtype if value.const_value is not None else None
    if dtype in _HALF_BYTE or (dtype in _ONE_BYTE and _bits(value) == 4):
        return "4-bit"
    if dtype in _ONE_BYTE:
        return "8-bit"
    if dtype in _FLOATS:
        return "float32" if dtype == ir.DataType.FLOAT else "float16"
    return None


def weight_bytes(*models: ir.Model) -> int:
    """Count the bytes of weights; a place in a file counts once, however many weights of whatever shape lie there.

    Weights in no file yet are the same where name, dtype and shape are, as in several graphs of one model.
    """
    found: dict[object, int] = {}
    for model in models:
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    tensor = stored(value.const_value)
                    found[_place(value.name, tensor)] = tensor.nbytes
    return sum(found.values())


def _place(name: str | None, tensor: ir.TensorProtocol) -> object:
    if isinstance(tensor, FileTensor):
        return tensor.path, tensor.offset, tensor.nbytes
    return name, tensor.dtype, concrete_shape(tensor)


def graph_file_bytes(folder: Path) -> int:
    """Count the bytes of the graphs and their weights: what an app has to carry."""
    return sum(path.stat().st_size for path in (folder / GRAPHS).iterdir() if path.is_file())


def _bits(value: ir.Value) -> int:
    """Return the bits per element of a packed weight, as its first reader says: 8 where none says anything."""
    for node, _ in value.uses():
        for name in ("bits", "expert_weight_bits"):
            if name in node.attributes:
                return node.attributes[name].as_int()
    return 8


def _transformers_js(folder: Path) -> dict[str, Any]:
    graphs = sorted(path.name for path in (folder / GRAPHS).glob("*.onnx"))
    external = {name: 1 for name in graphs if (folder / GRAPHS / f"{name}_data").is_file()}
    endings = {ending for ending in _TRANSFORMERS_JS_DTYPES if all(Path(name).stem.endswith(ending) for name in graphs)}
    ending = max(endings, key=len, default="")
    settings: dict[str, Any] = {"dtype": _TRANSFORMERS_JS_DTYPES[ending]}
    if external:
        settings["use_external_data_format"] = external
    if ending.endswith("16"):
        settings["kv_cache_dtype"] = {"fp16": "float16", "q4f16": "float16"}
    return settings


def _inside(name: str) -> Path:
    """Turn a sidecar file's name into a path that stays in the artifact."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise CorruptFileError(f"companion file {name!r} would leave the artifact")
    return Path(path)
