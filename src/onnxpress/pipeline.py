"""The driver: source -> export -> [pass -> verify]* -> evaluate -> gate -> package -> artifact folder.

`_start` and `_run` are that line; `build`, `export` and `optimize` are three ways into it. Nothing is put in place
before every gate has passed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxpress.artifact.artifact import Artifact, Step
from onnxpress.artifact.manifest import Manifest
from onnxpress.building.outputs import artifact_name, checkpoint_folder, default_output, output_folders
from onnxpress.building.packaging import package
from onnxpress.building.resolving import resolve
from onnxpress.building.work import Work, graph_bytes
from onnxpress.errors import UsageError
from onnxpress.evaluation.evaluate import Evaluation
from onnxpress.files.staging import replacing, replacing_file
from onnxpress.optimizers import recipe as recipes
from onnxpress.optimizers.recipe import Recipe
from onnxpress.progress import Progress
from onnxpress.requests import Judging, ModelSource
from onnxpress.runtime_profiles import profile as profiles
from onnxpress.runtime_profiles.profile import Profile
from onnxpress.search.recipe_choice import (
    STRUCTURE,
    RecipeRequest,
    budget,
    check_search,
    checked,
    default_recipe,
    requested_recipe,
    with_our_operators,
)

if TYPE_CHECKING:
    from onnxpress.exporter.sources.checkpoint import Checkpoint
    from onnxpress.exporter.tracing.binding import WeightType
    from onnxpress.graph.tensors import WeightTensor
    from onnxpress.search.kernels import KernelTable
    from onnxpress.search.sensitivity_profile import SensitivityProfile

__all__ = ["BuildResult", "build", "export", "kernels", "optimize", "sensitivity"]

ANY_TARGET = Profile(name="any", description="an export is for no target yet", opset=99, ir_version=99, recipes={})


@dataclass(frozen=True)
class BuildResult:
    """An artifact in its place."""

    path: Path
    manifest: Manifest
    """The content of its artifact.json."""
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    """What the user should know: a fallback, something that the target minds."""


def build(
    source: str | Path | ModelSource,
    *,
    recipe: RecipeRequest | None = None,
    profile: str = "cpu",
    judging: Judging | None = None,
    output: str | Path | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Make a verified artifact of a model, however it is named.

    Args:
        recipe: the name or file of a recipe, or a list of passes such as "quantize-blocks:bits=4"; None: the target's,
            or with gates a search.
        profile: the name or file of the target.
        output: the folder of the artifact; None: ./NAME-onnx.
        checkpoint: a folder for the model as it is before weights are packed or quantized, in Hugging Face's format,
            verified against the graph.

    Raises UsageError, BadInputError, GateFailedError, VerificationError or OutputError; then nothing is written and an
    artifact that stood at `output` is untouched.
    """
    source, judging, progress = ModelSource.of(source), judging or Judging(), progress or Progress(enabled=False)
    target = profiles.load_profile(profile)
    chosen = requested_recipe(recipe, target)
    check_search(chosen, judging)
    output, checkpoint = output_folders(output or default_output(source.model), checkpoint)
    resolved = resolve(source, progress)
    with replacing(output) as stage, checkpoint_folder(checkpoint) as beside:
        work = _start(stage.work, resolved, source, target, judging, progress)
        judging = _in_amounts(judging, work)
        chosen, quality = _run(work, chosen or default_recipe(source.model, work.artifact, target, judging), judging)
        if beside is not None:
            _write_checkpoint(work, beside, None if isinstance(resolved, Artifact) else resolved.tensors)
        if source.logits != "all":
            _cut_logits(work)
        record = package(artifact_name(source.model), work, stage.result, chosen, quality, judging)
    return BuildResult(output, record, work.steps, tuple(work.notes))


def export(
    source: str | Path | ModelSource,
    *,
    dtype: WeightType = "float32",
    threads: int | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Make an artifact with the float32 graph of a checkpoint, verified against it, and nothing else.

    Args:
        dtype: how its file holds the weight matrices; "auto" keeps the checkpoint's bytes.
        threads: of the verification.
        output: see `build`.
    """
    source, progress = ModelSource.of(source), progress or Progress(enabled=False)
    judging = Judging(benchmark=False, threads=threads)
    output, _ = output_folders(output or default_output(source.model))
    resolved = resolve(source, progress)
    with replacing(output) as stage:
        work = _start(stage.work, resolved, source, ANY_TARGET, judging, progress, dtype)
        if source.logits == "last":
            _cut_logits(work)
        record = package(artifact_name(source.model), work, stage.result, None, None, judging)
    return BuildResult(output, record, work.steps, tuple(work.notes))


def optimize(
    source: str | Path | ModelSource,
    *,
    output: str | Path,
    recipe: RecipeRequest | None = None,
    profile: str = "cpu",
    judging: Judging | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Run passes on an artifact or on an ONNX graph made by anyone; the reference is what came in.

    Args: see `build`. Raises UsageError for a checkpoint, and what `build` raises.
    """
    source, judging, progress = ModelSource.of(source), judging or Judging(), progress or Progress(enabled=False)
    target = profiles.load_profile(profile)
    chosen = requested_recipe(recipe, target)
    check_search(chosen, judging)
    output, checkpoint = output_folders(output, checkpoint)
    artifact = resolve(source)
    if not isinstance(artifact, Artifact):
        raise UsageError(
            f"{source.model} is a checkpoint", hint="optimize takes ONNX; from a checkpoint: onnxpress build"
        )
    with replacing(output) as stage, checkpoint_folder(checkpoint) as beside:
        work = _start(stage.work, artifact, source, target, judging, progress)
        judging = _in_amounts(judging, work)
        chosen = with_our_operators(chosen or default_recipe(source.model, artifact, target, judging), artifact)
        chosen, quality = _run(work, chosen, judging)
        if beside is not None:
            _write_checkpoint(work, beside)
        if source.logits == "last":
            _cut_logits(work)
        record = package(artifact_name(artifact.source.name), work, stage.result, chosen, quality, judging)
    return BuildResult(output, record, work.steps, tuple(work.notes))


def sensitivity(
    source: str | Path | ModelSource,
    *,
    structure: bool = False,
    heads: bool = False,
    every: bool = False,
    recipe: RecipeRequest | None = None,
    profile: str = "cpu",
    judging: Judging | None = None,
    progress: Progress | None = None,
) -> SensitivityProfile:
    """Measure what each product of a model loses, weighs and takes in each format of a recipe, after the recipe's
    passes, and what each block loses with each of its cuts.

    Args:
        structure: try the cuts of the recipe `budget-structure` and no formats.
        heads: take out single attention heads, and try no formats.
        every: measure every loss, rather than infer those of finer formats from the coarsest one's that loses alike.
        recipe: one with formats or cuts; None: by the model.
        judging: its calibration, its threads and the kernel table of its search count here.
    """
    from onnxpress.search.sensitivity_profile import measure_profile

    mapped, judging = structure or heads, judging or Judging()
    if mapped and recipe:
        raise UsageError(
            "--structure and --heads are without a recipe", hint="the cuts of a recipe of your own are tried anyway"
        )
    with _prepared(source, recipe, profile, judging, progress, STRUCTURE if mapped else None) as (work, chosen):
        if mapped:
            chosen = replace(chosen, formats={}, cuts=chosen.cuts if structure else {})
        return measure_profile(work, chosen, judging.search.kernel_table, every=every, heads=heads)


def kernels(
    source: str | Path | ModelSource,
    output: str | Path,
    *,
    recipe: RecipeRequest | None = None,
    profile: str = "cpu",
    judging: Judging | None = None,
    progress: Progress | None = None,
) -> KernelTable:
    """Time the kernels of a model's products on this machine and write the table to a file, see `sensitivity`."""
    from onnxpress.search.sensitivity_profile import time_kernels

    with _prepared(source, recipe, profile, judging or Judging(), progress) as (work, chosen):
        table = time_kernels(work, chosen)
    with replacing_file(Path(output)) as path:
        path.write_text(table.to_json(), encoding="utf-8")
    return table


@contextmanager
def _prepared(
    source: str | Path | ModelSource,
    recipe: RecipeRequest | None,
    profile: str,
    judging: Judging,
    progress: Progress | None,
    default: str | None = None,
) -> Iterator[tuple[Work, Recipe]]:
    """Yield a model after the passes of a recipe that are run before its cuts and formats, in a folder that goes away.

    default: the recipe where none is named; by default it depends on the model.
    """
    source, progress = ModelSource.of(source), progress or Progress(enabled=False)
    target = profiles.load_profile(profile)
    chosen = requested_recipe(recipe, target)
    if chosen is not None and not chosen.searched:
        raise UsageError(
            f"recipe {chosen.name} has no formats to choose from, and no cuts", hint="see [[format]] in `budget`"
        )
    resolved = resolve(source, progress)
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        work = _start(Path(folder), resolved, source, target, judging, progress)
        chosen = chosen or checked(recipes.load_recipe(default or budget(work.artifact)), target)
        _apply(work, chosen)
        yield work, chosen


def _start(
    folder: Path,
    resolved: Artifact | Checkpoint,
    source: ModelSource,
    target: Profile,
    judging: Judging,
    progress: Progress,
    dtype: WeightType = "float32",
) -> Work:
    """Take the graphs to start from, those of a checkpoint exported and verified against it."""
    text, pairs = (None if path is None else Path(path) for path in (judging.text, judging.pairs))
    judging = replace(judging, text=text, pairs=pairs)
    if isinstance(resolved, Artifact):
        if dtype != "float32":
            raise UsageError("--dtype is for checkpoints; this is ONNX already", hint="see: onnxpress list passes")
        return Work(folder, resolved, target, judging, progress)
    from onnxpress.exporter.export import export as export_checkpoint

    began = time.perf_counter()
    with progress.stage("exporting"):
        artifact = export_checkpoint(resolved, task=source.task, context_length=source.context_length, dtype=dtype)
    work = Work(folder, artifact, target, judging, progress)
    options = {} if dtype == "float32" else {"dtype": dtype}
    work.check_export(Step("export", options, time.perf_counter() - began, {"graphs": len(artifact.graphs)}), resolved)
    return work


def _run(work: Work, recipe: Recipe, judging: Judging) -> tuple[Recipe, Evaluation]:
    """[pass -> verify]* -> evaluate: the recipe that was run, what a search chose in it, and the quality."""
    _apply(work, recipe)
    if not recipe.searched:
        return recipe, work.evaluate()
    from onnxpress.search.budget import search

    chosen = search(work, recipe, judging.gates, judging.search)
    work.notes += chosen.notes
    return chosen.recipe, chosen.quality


def _apply(work: Work, recipe: Recipe) -> None:
    """Run the passes of a recipe, those that come before anything is searched."""
    for spec, graph_pass in zip(recipe.passes, recipe.build(), strict=True):
        work.apply(spec, graph_pass)


def _cut_logits(work: Work) -> None:
    """Cut a decoder's logits to the last position: quality needs those of every position, generation does not."""
    if work.artifact.task.startswith("text-generation"):
        work.cut_logits()


def _in_amounts(judging: Judging, work: Work) -> Judging:
    """Replace limits that are shares of the float32 model by amounts."""
    parameters = work.structure.parameters if work.structure else None
    return replace(judging, gates=judging.gates.in_amounts(graph_bytes(work.reference), parameters))


def _write_checkpoint(work: Work, folder: Path, originals: Mapping[str, WeightTensor] | None = None) -> None:
    """Write the float model to an empty folder; originals: the weights that it came from."""
    from onnxpress.building.checkpoint_output import write_verified_checkpoint

    write_verified_checkpoint(work, folder, originals)
