"""The last step of a build: measure what was made, hold it to the gates, and write the artifact folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from onnxpress.artifact import manifest
from onnxpress.artifact.folder import graph_file_bytes, write_graphs, write_sidecar_files
from onnxpress.artifact.genai_config import write_genai_config
from onnxpress.artifact.golden import write_golden
from onnxpress.artifact.manifest import Manifest, StepRecord
from onnxpress.building import measuring
from onnxpress.building.gates import require
from onnxpress.building.work import Work, graph_bytes
from onnxpress.evaluation.evaluate import Evaluation
from onnxpress.files.layout import MANIFEST
from onnxpress.graph.conventions import DECODER_MERGED
from onnxpress.graph.io import load_graph
from onnxpress.optimizers.recipe import Recipe
from onnxpress.report import overview
from onnxpress.report.figures import before_after
from onnxpress.report.pages import write_report
from onnxpress.requests import Judging


def package(
    title: str,
    work: Work,
    result: Path,
    recipe: Recipe | None,
    quality: Evaluation | None,
    judging: Judging,
) -> Manifest:
    """Write the artifact `title` to the folder `result`, graphs first: size and speed are those of the files to ship.

    Args:
        recipe, quality: what was run, and how good the outcome is; None for an export, which is not measured.

    Raises GateFailedError.
    """
    progress, options = work.progress, work.profile.session_options
    graphs = {name: load_graph(path) for name, path in work.current.items()}
    with progress.stage("writing the artifact") as update:
        paths = write_graphs(graphs, result, progress=update)
    if DECODER_MERGED in paths:
        work.check_merged(paths)
    write_sidecar_files(work.artifact, result)
    for name, model in graphs.items():
        work.notes += overview.objections(paths[name].name, model, work.profile)

    before = {"size_bytes": float(graph_bytes(work.reference))}
    after = {"size_bytes": float(graph_file_bytes(result))}
    if work.structure is not None:
        after["parameters"] = float(work.structure.parameters)
    if quality is not None:
        after |= measuring.figures(quality)
        if quality.reference_perplexity is not None:
            before["perplexity"] = quality.reference_perplexity
    if recipe is not None and (judging.benchmark or judging.gates.need_benchmark):
        with progress.stage("measuring speed and memory"):
            before |= measuring.speed(work.reference, work.judging.threads, options)
            after |= measuring.speed(paths, work.judging.threads, options)
    checked = judging.gates.check(after)
    require(checked, before, work.steps)

    record = Manifest(
        name=title,
        task=work.artifact.task,
        model_type=work.artifact.config.get("model_type"),
        source=manifest.source_record(work.artifact.source),
        export=dict(work.artifact.export),
        profile=work.profile.name,
        session_options=dict(options),
        recipe=recipe.to_dict() if recipe else None,
        steps=[StepRecord.of(step) for step in work.steps],
        before=before if recipe else {},
        metrics=after,
        gates=checked,
        machine=manifest.machine(),
        versions=manifest.versions(),
    )
    _write_configs(result, work, graphs, paths)
    write_report(result, record, before_after(record.before, record.metrics))
    (result / MANIFEST).write_text(record.to_json(), encoding="utf-8")  # it says how to open the graph
    with progress.stage("recording golden outputs"):
        write_golden(result, threads=work.judging.threads)
    with progress.stage("hashing"):
        record = record.model_copy(update={"files": manifest.hash_files(result)})
    (result / MANIFEST).write_text(record.to_json(), encoding="utf-8")
    return record


def _write_configs(result: Path, work: Work, graphs: Mapping[str, ir.Model], paths: Mapping[str, Path]) -> None:
    """Write genai_config.json, for a decoder of one graph."""
    if "model" in graphs:
        inside = paths["model"].relative_to(result).as_posix()
        write_genai_config(result, graphs["model"], inside, work.artifact.config, work.profile.session_options)
