"""Open what runs in onnxruntime: an ONNX file, an artifact folder, a folder of graphs.

A checkpoint is opened by `onnxpress.exporter.reference.open_in_torch`, which needs torch, into the same classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import onnxruntime

from onnxpress.errors import BadInputError, SourceNotFoundError
from onnxpress.evaluation.decoder import Decoder
from onnxpress.evaluation.encoder import Encoder
from onnxpress.evaluation.encoder_decoder import EncoderDecoder
from onnxpress.evaluation.graph import Graph
from onnxpress.evaluation.kind import GraphFile, Opened
from onnxpress.files.json_files import read_optional_json
from onnxpress.graph.conventions import DECODER, DECODER_WITH_PAST, ENCODER
from onnxpress.runtime.sessions import open_session

KINDS: tuple[type[Opened], ...] = (EncoderDecoder, Decoder, Encoder, Graph)
"""All kinds of models, in the order in which a graph is offered to them; the last one takes any."""


def open_model(
    what: str | Path | Opened,
    *,
    threads: int | None = None,
    session_options: Mapping[str, str] | None = None,
    profile_prefix: str | None = None,
    all_logits: bool = False,
) -> Opened:
    """Open an ONNX file, or a folder with graphs (`*.onnx`, `onnx/*.onnx`); what is open already is returned.

    A folder runs with the session options of its artifact.json unless others are given.

    all_logits: where the pass `last-logits` cut a decoder's logits, undo that in memory. Measuring quality from the
    last position alone takes a whole prompt per position.

    Raises:
        SourceNotFoundError: nothing is there.
        BadInputError: a folder has no graph (a checkpoint), or several.
    """
    if isinstance(what, Opened):
        return what
    path = Path(what)
    if path.is_file() and path.suffix == ".onnx":
        folder = sidecar_folder(path)
    elif path.is_dir():
        path, folder = only_graph(path), path
        if session_options is None:
            session_options = read_optional_json(folder / "artifact.json").get("session_options")
    else:
        raise SourceNotFoundError(f"no such ONNX file or folder: {path}")
    config = read_optional_json(folder / "config.json") if folder else {}
    genai = read_optional_json(folder / "genai_config.json").get("model", {}) if folder and not config else {}
    session = cache(partial(_load, path, session_options, threads, profile_prefix, all_logits))
    file = GraphFile(path, folder, config, genai, session, session_options, threads, profile_prefix)
    return next(opened for kind in KINDS if (opened := kind.open(file)) is not None)


def find_graphs(folder: Path) -> list[Path]:
    """List the ONNX files of an artifact or of a folder of graphs."""
    return sorted([*folder.glob("onnx/*.onnx"), *folder.glob("*.onnx")])


def only_graph(folder: Path) -> Path:
    """Find the one graph of a folder, or the encoder of an encoder-decoder. BadInputError for none or several."""
    graphs = find_graphs(folder)
    if not graphs:
        if (folder / "config.json").is_file():
            raise BadInputError(
                f"{folder} has no ONNX graph: it is a checkpoint", hint="onnxpress build, or export, first"
            )
        raise BadInputError(f"{folder} has no config.json", hint="give a checkpoint folder, or an ONNX file")
    encoders = [path for path in graphs if path.stem.startswith(ENCODER)]
    others = [path for path in graphs if not path.stem.startswith((DECODER, DECODER_WITH_PAST))]
    choice = encoders or others
    if len(choice) != 1:
        names = ", ".join(path.name for path in graphs)
        raise BadInputError(f"{folder} has several graphs: {names}", hint="give the path of one of them")
    return choice[0]


def sidecar_folder(path: Path) -> Path | None:
    """Find the folder near a graph that has its tokenizer or config."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "tokenizer.json").is_file() or (folder / "config.json").is_file():
            return folder
    return None


def _load(
    path: Path, options: Mapping[str, str] | None, threads: int | None, profile_prefix: str | None, all_logits: bool
) -> onnxruntime.InferenceSession:
    content = _with_all_logits(path) if all_logits else None
    return open_session(path, options, threads, profile_prefix=profile_prefix, content=content)


def _with_all_logits(path: Path) -> bytes | None:
    """Return the graph as it was before `last-logits`, without its external weights; None where that pass was not
    run."""
    import onnx_ir as ir  # here, since the benchmark's process measures its own memory

    from onnxpress.graph.io import load_graph
    from onnxpress.graph.logits import restore_logits

    model = load_graph(path)
    return ir.to_proto(model).SerializeToString() if restore_logits(model) else None
