"""Checkpoint to artifact: the graphs of a model, its weights bound but not read."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from onnxpress.artifact.artifact import Artifact
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.layers import export_cache as blueprint
from onnxpress.exporter.sources.checkpoint import Checkpoint
from onnxpress.exporter.sources.weights import TensorSource
from onnxpress.exporter.tracing import lowering
from onnxpress.exporter.tracing.lowering import WeightType
from onnxpress.graph.storage import HALVES


def export(
    checkpoint: Checkpoint,
    *,
    task: str | None = None,
    context_length: int | None = None,
    dtype: WeightType = "float32",
    remember: bool = True,
) -> Artifact:
    """Export a checkpoint to float32 graphs with lazy weights.

    Tracing takes most of the time and depends on the architecture alone, so what it found is remembered for the next
    checkpoint of the same shape (see `blueprint.py`); that one is exported without torch.

    Args:
        task: optimum's task name; by default what the checkpoint says.
        context_length: positions that rotary tables serve; by default the model's own limit.
        dtype: how files will hold the matrices; "auto" copies what the checkpoint has. Arithmetic is float32 anyhow.
        remember: use and keep blueprints in the user's cache.

    Raises:
        UnsupportedModelError: the architecture cannot be exported, or not for this task.
        CorruptFileError: the checkpoint lacks parameters or has them in other shapes.
        UsageError: unknown task; a context longer than the model's.
    """
    key = blueprint.key(checkpoint, task, context_length) if remember else None
    known = blueprint.load(key, checkpoint) if key is not None else None
    if known is None:
        with _collector_paused():
            from onnxpress.exporter.trace_checkpoint import trace_checkpoint

            traced = trace_checkpoint(checkpoint, task, context_length)
        known = blueprint.Blueprint(traced.task, traced.graphs, dict(traced.sources), traced.described)
        if key is not None:
            # read back, so that the first export gives the same bytes as every later one
            known = blueprint.store(key, known, checkpoint) or known
    for graph in known.graphs.values():
        if known.described["method"] != "fallback":
            lowering.bind(graph, known.sources, dtype)
        elif dtype != "float32":
            raise UnsupportedModelError(
                f"this architecture is exported by transformers itself, in float32 only: no weights in {dtype}",
                hint="leave out --dtype",
            )
        graph.producer_name = "onnxpress"
    return Artifact(
        task=known.task,
        graphs=known.graphs,
        config=dict(checkpoint.config),
        files=dict(checkpoint.files),
        source=checkpoint.source,
        export={
            **known.described,
            "dtype": dtype,
            "rounded": _rounds(known.sources, dtype),
            "stored_bits": _stored_bits(known.sources),
        },
    )


def _rounds(sources: Mapping[str, TensorSource], dtype: WeightType) -> bool:
    """Whether files will hold weights in less than the precision, or the range, of the checkpoint."""
    kinds = {(source.dtype, lowering.stored_type(source, dtype)) for source in sources.values()}
    return any(kept in HALVES and kept != before for before, kept in kinds)


def _stored_bits(sources: Mapping[str, TensorSource]) -> float:
    """Bits that a weight takes in the checkpoint, on average."""
    weights = sum(source.size for source in sources.values())
    return round(8 * sum(source.stored_bytes for source in sources.values()) / max(1, weights), 3)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No search for garbage cycles: imports and traces make hundreds of thousands of objects that stay, and looking
    through them again and again takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
