"""Open what the user calls a model: a checkpoint to export, or graphs that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxpress.artifact.artifact import Artifact
from onnxpress.artifact.folder import read_artifact
from onnxpress.errors import BadInputError
from onnxpress.evaluation.kind import Opened
from onnxpress.evaluation.opening import find_graphs, open_model
from onnxpress.files.layout import is_artifact
from onnxpress.graph.conventions import DECODER, DECODER_MERGED
from onnxpress.graph.io import load_graph
from onnxpress.progress import Progress
from onnxpress.requests import ModelSource

if TYPE_CHECKING:
    from onnxpress.exporter.sources.checkpoint import Checkpoint
    from onnxpress.exporter.sources.onnx_files import OnnxSource


def resolve(source: ModelSource, progress: Progress | None = None) -> Artifact | Checkpoint:
    """Open what a source names: an Artifact for ONNX (ours or anyone's), a Checkpoint for everything else."""
    from onnxpress.exporter.sources import source as sources

    if is_artifact(Path(source.model)):
        return read_artifact(Path(source.model))
    progress = progress or Progress(enabled=False)
    with progress.stage(f"resolving {source.model}"):
        found = sources.resolve_source(
            source.model,
            trust_remote_code=source.trust_remote_code,
            allow_pickle=source.allow_pickle,
            offline=source.offline,
            progress=progress.message,
        )
        return _foreign(found) if isinstance(found, sources.OnnxSource) else found


def open_any(what: str | Path | Checkpoint, *, threads: int | None = None, all_logits: bool = False) -> Opened:
    """Open ONNX in onnxruntime (see `open_model`), and a checkpoint in torch, in float32.

    Raises BadInputError where torch is missing or cannot load the checkpoint, and the errors of `open_model`.
    """
    if isinstance(what, str | Path) and (not Path(what).is_dir() or find_graphs(Path(what))):
        return open_model(what, threads=threads, all_logits=all_logits)
    return open_checkpoint(what)


def open_checkpoint(checkpoint: str | Path | Checkpoint, task: str | None = None) -> Opened:
    """Open a checkpoint in torch, in float32. Raises BadInputError where torch is missing or cannot load it."""
    try:
        from onnxpress.exporter import reference
    except ImportError as error:
        raise BadInputError(
            f"{checkpoint} is a checkpoint, and running one needs torch ({error})",
            hint="pip install 'onnxpress[export]'",
        ) from error
    return reference.open_in_torch(checkpoint, task=task)


def _foreign(source: OnnxSource) -> Artifact:
    """Take a graph that someone else made, with the files beside it."""
    merged_too = DECODER in source.graphs  # then it is made of the others when they are written
    graphs = {
        name: load_graph(path) for name, path in source.graphs.items() if name != DECODER_MERGED or not merged_too
    }
    for graph in graphs.values():
        _size_caches(graph, source.config.get("head_dim"))
    return Artifact(
        task=_task(graphs, source.config),
        graphs=graphs,
        config=source.config,
        files=source.files,
        source=source.source,
        export={"method": "foreign", "layout": source.layout},
    )


def _size_caches(model: ir.Model, head_dim: Any) -> None:
    """Write head_dim into the shapes of caches that leave it open, as the genai builder's do: empty ones are made."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        caches = (value.name or "").startswith(("past_key_values.", "present"))
        shape = value.shape
        if isinstance(head_dim, int) and caches and shape is not None and len(shape) == 4:
            value.shape = ir.Shape([*shape[:3], shape[3] if isinstance(shape[3], int) else head_dim])


def _task(graphs: Mapping[str, ir.Model], config: Mapping[str, Any]) -> str:
    """Infer optimum's task name: what config.json says, else what the inputs and outputs look like."""
    if config.get("architectures") and config.get("model_type"):
        from onnxpress.exporter.tasks import infer_task

        return infer_task(SimpleNamespace(architectures=config["architectures"], model_type=config["model_type"]))
    if any(name.startswith("encoder_model") for name in graphs):
        return "text2text-generation"
    graph = next(iter(graphs.values())).graph
    caches = any((value.name or "").startswith("past_key_values.") for value in graph.inputs)
    return "text-generation" if caches else "feature-extraction"
