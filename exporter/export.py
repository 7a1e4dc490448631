"""Checkpoint to artifact: the graphs of a model, its weights bound but not read."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from onnxpress.artifact.artifact import Artifact
from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.layers import export_cache
from onnxpress.exporter.sources.checkpoint import Checkpoint
from onnxpress.exporter.tracing.binding import WeightType, bind, stored_type
from onnxpress.graph.storage import HALVES
from onnxpress.graph.tensors import WeightTensor


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
    checkpoint of the same shape (see `export_cache.py`); that one is exported without torch.

    Args:
        task: optimum's task name; by default what the checkpoint says.
        context_length: positions that rotary tables serve; by default the model's own limit.
        dtype: how files will hold the matrices; "auto" copies what the checkpoint has. Arithmetic is float32 anyhow.
        remember: look in the user's cache for what tracing found before, and keep it there.

    Raises:
        UnsupportedModelError: the architecture cannot be exported, or not for this task.
        CorruptFileError: the checkpoint lacks parameters or has them in other shapes.
        UsageError: unknown task; a context longer than the model's.
    """
    key = export_cache.entry_key(checkpoint, task, context_length) if remember else None
    traced = export_cache.load_entry(key, checkpoint) if key is not None else None
    if traced is None:
        with _collector_paused():
            from onnxpress.exporter.trace_checkpoint import trace_checkpoint

            traced = trace_checkpoint(checkpoint, task, context_length)
        if key is not None:
            # read back, so that the first export gives the same bytes as every later one
            traced = export_cache.store_entry(key, traced, checkpoint) or traced
    for graph in traced.graphs.values():
        if traced.described["method"] != "fallback":
            bind(graph, traced.parameters, dtype)
        elif dtype != "float32":
            raise UnsupportedModelError(
                f"this architecture is exported by transformers itself, in float32 only: no weights in {dtype}",
                hint="leave out --dtype",
            )
        graph.producer_name = "onnxpress"
    return Artifact(
        task=traced.task,
        graphs=traced.graphs,
        config=dict(checkpoint.config),
        files=dict(checkpoint.files),
        source=checkpoint.source,
        export={
            **traced.described,
            "dtype": dtype,
            "rounded": _rounds(traced.parameters, dtype),
            "stored_bits": _stored_bits(traced.parameters),
        },
    )


def _rounds(parameters: Mapping[str, WeightTensor], dtype: WeightType) -> bool:
    """Whether files will hold weights in less than the precision, or the range, of the checkpoint."""
    types = {(tensor.dtype, stored_type(tensor, dtype)) for tensor in parameters.values()}
    return any(stored in HALVES and stored != before for before, stored in types)


def _stored_bits(parameters: Mapping[str, WeightTensor]) -> float:
    """Bits that a weight takes in the checkpoint, on average."""
    weights = sum(tensor.size for tensor in parameters.values())
    return round(8 * sum(tensor.stored_bytes for tensor in parameters.values()) / max(1, weights), 3)


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
