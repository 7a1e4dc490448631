"""The float model as a Hugging Face checkpoint, written beside the artifact and verified against its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from onnxpress.artifact.structure import StructureChange
from onnxpress.building.measuring import Meter
from onnxpress.building.work import Work
from onnxpress.errors import UnsupportedModelError, VerificationError
from onnxpress.exporter.writing.placing import place_weights
from onnxpress.graph.conventions import DECODER_MERGED
from onnxpress.graph.io import load_graph
from onnxpress.graph.tensors import WeightTensor
from onnxpress.runtime.memory import available_memory


def write_verified_checkpoint(work: Work, folder: Path, originals: Mapping[str, WeightTensor] | None = None) -> None:
    """Write the graphs as they were before weights were packed or quantized to an empty folder, and verify it.

    originals: tensors of the checkpoint that the model came from, for what no graph has: a pooler, another task's head.

    Raises:
        UnsupportedModelError: there is no such moment, or something in the graph has no place in a checkpoint.
        VerificationError: transformers, given the folder, computes something else than the graph.
    """
    hint = "leave out --checkpoint: the artifact itself can be made"
    if work.float_graphs is None or not work.artifact.config:
        reason = "has no config.json" if not work.artifact.config else "has no float layers that were recognised"
        raise UnsupportedModelError(f"no checkpoint can be written: {work.artifact.source.name} {reason}", hint=hint)
    record = StructureChange.of(work.artifact.export)
    if record is not None and record.onnx_only:
        raise UnsupportedModelError(
            f"the reduced model is for ONNX only, no checkpoint can hold it: {'; '.join(record.onnx_only)}", hint=hint
        )
    from onnxpress.exporter.writing.write_checkpoint import write_checkpoint

    with work.progress.stage("writing the checkpoint"):
        graphs = [load_graph(path) for name, path in work.float_graphs.items() if name != DECODER_MERGED]
        artifact = work.artifact
        written = write_checkpoint(
            folder, place_weights(graphs), artifact.config, artifact.files, artifact.task, originals=originals
        )
    difference = _verify(work, folder, written.parameters)
    checked = "" if math.isnan(difference) else f"; transformers agrees with the graph to {difference:.1e}"
    work.notes.append(f"checkpoint: {written.tensors} tensors, {written.parameters:,} parameters{checked}")
    if written.left_out:
        names = ", ".join(written.left_out[:3])
        work.notes.append(
            f"the checkpoint lacks {len(written.left_out)} parameters that the graph has no use for: {names}"
        )


def _verify(work: Work, folder: Path, parameters: int) -> float:
    """Return the largest difference; NaN, with a note, where memory does not hold the model."""
    if 4 * parameters > available_memory() / 2:
        work.notes.append(f"the checkpoint was not verified: it takes {4 * parameters / 1e9:.0f} GB of memory")
        return math.nan
    assert work.float_graphs is not None
    with work.progress.stage("verifying the checkpoint"):
        meter = Meter(work.float_graphs, work.judging, dict(work.profile.session_options))
        try:
            found = meter.check_export(folder, work.artifact.task)
        except VerificationError as error:
            raise VerificationError(
                f"the checkpoint is not the model of the graph: {error}", hint=error.hint
            ) from error
    return found["max_difference"]
