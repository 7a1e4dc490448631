"""Open whatever can be measured: an ONNX file, an artifact folder, a folder of graphs, a checkpoint through torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxpress.errors import BadInputError, CorruptFileError, SourceNotFoundError
from onnxpress.graph.conventions import DECODER, DECODER_WITH_PAST, ENCODER
from onnxpress.runtime.decoder import DecoderSession
from onnxpress.runtime.sessions import NUMPY_TYPES, EncoderDecoderSession, EncoderSession, open_session


@dataclass(frozen=True)
class Opened:
    """A model ready to run, with what belongs to it."""

    name: str
    kind: str
    """`decoder`, `encoder` (token ids in, vectors out), `encoder-decoder`, or `graph` (anything else)."""
    model: Any
    """DecoderSession, EncoderSession, EncoderDecoderSession or exporter.reference.TorchReference."""
    config: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    """Where tokenizer.json and config.json are, if anywhere."""

    @property
    def starts(self) -> list[int]:
        """Token ids that text may begin with: `bos_token_id`, else `eos_token_id`, else 0."""
        text_config = self.config.get("text_config") or {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = self.config.get(key, text_config.get(key))
            if value is not None:
                return list(value) if isinstance(value, list) else [int(value)]
        return [0]


def open_model(
    what: Any,
    *,
    task: str | None = None,
    threads: int | None = None,
    session_options: Mapping[str, str] | None = None,
    profile_prefix: str | None = None,
    all_logits: bool = False,
) -> Opened:
    """Open `what`: a path, an `exporter.checkpoint.Checkpoint`, or something opened already.

    A folder with graphs (`*.onnx`, `onnx/*.onnx`) runs in onnxruntime, with the session options of its artifact.json
    unless others are given; a folder with config.json and weights runs in torch, in float32.

    all_logits: where the pass `last-logits` cut a decoder's logits, undo that in memory. Measuring quality from the
    last position alone takes a whole prompt per position.
    """
    if isinstance(what, Opened):
        return what
    if not isinstance(what, str | Path):
        return _torch(what, task)
    path = Path(what)
    if path.is_file() and path.suffix == ".onnx":
        return _graphs(path, companions(path), session_options, threads, profile_prefix, all_logits)
    if not path.is_dir():
        raise SourceNotFoundError(f"no such ONNX file or folder: {path}")
    graphs = find_graphs(path)
    if not graphs:
        return _torch(path, task)
    if session_options is None:
        session_options = read_json(path / "artifact.json").get("session_options")
    return _graphs(main_graph(graphs, path), path, session_options, threads, profile_prefix, all_logits)


def find_graphs(folder: Path) -> list[Path]:
    """The ONNX files of an artifact or of a folder of graphs."""
    return sorted([*folder.glob("onnx/*.onnx"), *folder.glob("*.onnx")])


def main_graph(graphs: list[Path], folder: Path) -> Path:
    """The one graph of a folder, or the encoder of an encoder-decoder."""
    encoders = [path for path in graphs if path.stem.startswith(ENCODER)]
    others = [path for path in graphs if not path.stem.startswith((DECODER, DECODER_WITH_PAST))]
    choice = encoders or others
    if len(choice) != 1:
        names = ", ".join(path.name for path in graphs)
        raise BadInputError(f"{folder} has several graphs: {names}", hint="give the path of one of them")
    return choice[0]


def companions(path: Path) -> Path | None:
    """The folder near a graph that has its tokenizer or config."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "tokenizer.json").is_file() or (folder / "config.json").is_file():
            return folder
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path} is not a JSON object")
    return value


def _graphs(
    path: Path,
    folder: Path | None,
    options: Mapping[str, str] | None,
    threads: int | None,
    profile_prefix: str | None,
    all_logits: bool,
) -> Opened:
    config = read_json(folder / "config.json") if folder else {}
    genai = read_json(folder / "genai_config.json").get("model", {}) if folder and not config else {}
    if path.stem.startswith(ENCODER) and list(path.parent.glob(f"{DECODER}*.onnx")):
        suffix = path.stem[len(ENCODER) :]
        model: Any = EncoderDecoderSession(path.parent, options, threads, suffix=suffix, profile_prefix=profile_prefix)
        return Opened(path.parent.name, "encoder-decoder", model, config, folder)
    content = _with_all_logits(path) if all_logits else None
    session = open_session(path, options, threads, profile_prefix=profile_prefix, content=content)
    inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    decodes = any(name.startswith("past_key_values.") for name in inputs) or (
        outputs[:1] == ["logits"] and str(config.get("architectures")).endswith(("CausalLM']", "LMHeadModel']"))
    )
    if "input_ids" in inputs and "logits" in outputs and decodes:
        return Opened(
            path.name, "decoder", DecoderSession(session, head_dim=_head_size(genai)), config or genai, folder
        )
    kind = "encoder" if "input_ids" in inputs and "pixel_values" not in inputs else "graph"
    return Opened(path.name, kind, EncoderSession(session), config, folder)


def _head_size(genai: Mapping[str, Any]) -> int | None:
    """What genai_config.json says of the size of a head."""
    size = (genai.get("decoder") or {}).get("head_size")
    return size if isinstance(size, int) else None


def _with_all_logits(path: Path) -> bytes | None:
    """The graph as it was before `last-logits`, without its external weights; None where that pass was not run."""
    import onnx_ir as ir  # here, since the benchmark's process measures its own memory

    from onnxpress.graph.io import load_graph
    from onnxpress.graph.logits import restore_logits

    model = load_graph(path)
    return ir.to_proto(model).SerializeToString() if restore_logits(model) else None


def _torch(checkpoint: Any, task: str | None) -> Opened:
    try:
        from onnxpress.exporter.reference import TorchReference
    except ImportError as error:
        raise BadInputError(
            f"{checkpoint} is a checkpoint, and running one needs torch ({error})",
            hint="pip install 'onnxpress[export]'",
        ) from error
    model = TorchReference(checkpoint, task=task)
    return Opened(model.name, model.kind, model, model.config, model.folder)


def random_feeds(session: EncoderSession, config: Mapping[str, Any], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Values for every input of a graph, from its shapes and dtypes; named dimensions get usual sizes."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for name, node in session.inputs.items():
        shape = [s if isinstance(s, int) else _size(name, axis, str(s), config) for axis, s in enumerate(node.shape)]
        dtype = NUMPY_TYPES.get(node.type)
        if dtype is None:
            raise BadInputError(f"input {name} has type {node.type}, which onnxpress cannot make up")
        if np.issubdtype(dtype, np.floating):
            feeds[name] = generator.standard_normal(shape).astype(dtype)
        elif "mask" in name or dtype is np.bool_:
            feeds[name] = np.ones(shape, dtype)
        elif "type" in name:
            feeds[name] = np.zeros(shape, dtype)
        else:
            feeds[name] = generator.integers(0, int(config.get("vocab_size", 16)), shape).astype(dtype)
    return feeds


def _size(name: str, axis: int, dimension: str, config: Mapping[str, Any]) -> int:
    if axis == 0 or "batch" in dimension:
        return 1
    image = config.get("vision_config", config).get("image_size", 224)
    sizes = {
        "pixel_values": [1, config.get("num_channels", 3), *(image if isinstance(image, list) else [image, image])],
        "input_values": [1, 16000],
        "input_features": [1, config.get("num_mel_bins", 80), 2 * config.get("max_source_positions", 1500)],
    }.get(name, [])
    return int(sizes[axis]) if axis < len(sizes) else 16
