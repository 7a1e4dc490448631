"""The driver: source -> export -> [pass -> verify]* -> evaluate -> gate -> package -> artifact folder.

`_begin` and `_press` are that line; `build`, `export` and `optimize` are three ways into it. Nothing is put in place
before every gate has passed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxpress.artifact.artifact import Artifact, Step
from onnxpress.artifact.manifest import Manifest
from onnxpress.build.gates import Gates
from onnxpress.build.measuring import Data
from onnxpress.build.packaging import package
from onnxpress.build.resolving import default_output, load, resolve
from onnxpress.build.work import Work, graph_bytes
from onnxpress.calibration.data import CalibrationData
from onnxpress.errors import UsageError
from onnxpress.files.staging import Staging, check_target, replacing, replacing_file
from onnxpress.optimizers import recipe as recipes
from onnxpress.optimizers.recipe import PassSpec, Recipe
from onnxpress.progress import Progress
from onnxpress.runtime_profiles import profile as profiles
from onnxpress.runtime_profiles.profile import Profile
from onnxpress.search.options import SearchOptions
from onnxpress.search.recipe_choice import STRUCTURE, budget, check_search, checked, default_recipe, with_our_operators

if TYPE_CHECKING:
    from onnxpress.exporter.sources.checkpoint import Checkpoint
    from onnxpress.exporter.sources.weights import TensorSource
    from onnxpress.exporter.tracing.lowering import WeightType
    from onnxpress.search.kernels import KernelTable
    from onnxpress.search.survey import Survey

__all__ = ["BuildResult", "build", "default_output", "export", "kernels", "load", "optimize", "resolve", "sensitivity"]

Logits = Literal["all", "last"]

ANY_TARGET = Profile(name="any", description="an export is for no target yet", opset=99, ir_version=99, recipes={})


@dataclass(frozen=True)
class BuildResult:
    """An artifact in its place."""

    path: Path
    manifest: Manifest
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    """What the user should know: a fallback, something that the target minds."""


def build(
    model: str,
    *,
    profile: str = "cpu",
    recipe: str | None = None,
    output: Path | None = None,
    gates: Gates | None = None,
    text: Path | None = None,
    pairs: Path | None = None,
    calibration: CalibrationData | None = None,
    search_options: SearchOptions | None = None,
    benchmark: bool = True,
    checkpoint: Path | None = None,
    task: str | None = None,
    logits: Logits | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """From a model, however it is named, to a verified artifact.

    checkpoint: a folder for the model as it is before weights are packed or quantized, in Hugging Face's format,
    verified against the graph.

    Raises UsageError, BadInputError, GateFailedError, VerificationError or OutputError; then nothing is written and an
    artifact that stood at `output` is untouched.
    """
    progress = progress or Progress(enabled=False)
    target = profiles.load_profile(profile)
    chosen = checked(recipes.load_recipe(recipe), target) if recipe else None
    check_search(chosen, gates, search_options)
    output = output or default_output(model)
    check_target(output)
    _check_checkpoint(checkpoint, output)
    flags = {"offline": offline, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    source = resolve(model, progress=progress, **flags)
    with replacing(output) as stage, _beside(checkpoint) as folder:
        work = _begin(
            stage.work,
            source,
            target,
            Data(text, pairs, calibration or CalibrationData()),
            threads,
            progress,
            task,
            context_length,
        )
        chosen = chosen or default_recipe(model, work.artifact, target, gates, search_options)
        record = _press(
            model,
            work,
            stage,
            chosen,
            gates,
            benchmark,
            last_logits=logits != "all",
            search_options=search_options,
            checkpoint=folder,
            originals=None if isinstance(source, Artifact) else source.tensors,
        )
    return BuildResult(output, record, work.steps, tuple(work.notes))


def export(
    model: str,
    *,
    output: Path | None = None,
    task: str | None = None,
    logits: Logits | None = None,
    context_length: int | None = None,
    dtype: WeightType = "float32",
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Only the export: an artifact with the float32 graph, verified against the checkpoint.

    `dtype`: how its file holds the weight matrices; "auto" keeps the checkpoint's bytes.
    """
    progress = progress or Progress(enabled=False)
    output = output or default_output(model)
    check_target(output)
    flags = {"offline": offline, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    source = resolve(model, progress=progress, **flags)
    with replacing(output) as stage:
        work = _begin(stage.work, source, ANY_TARGET, Data(), threads, progress, task, context_length, dtype)
        record = _press(model, work, stage, None, None, benchmark=False, last_logits=logits == "last")
    return BuildResult(output, record, work.steps, tuple(work.notes))


def optimize(
    source: str,
    *,
    output: Path,
    passes: Sequence[str | PassSpec] = (),
    recipe: str | None = None,
    profile: str = "cpu",
    gates: Gates | None = None,
    text: Path | None = None,
    pairs: Path | None = None,
    calibration: CalibrationData | None = None,
    search_options: SearchOptions | None = None,
    benchmark: bool = True,
    checkpoint: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Run passes on an artifact or on an ONNX graph made by anyone; the reference is what came in.

    checkpoint: see `build`.
    """
    if passes and recipe:
        raise UsageError("--pass and --recipe exclude each other")
    progress = progress or Progress(enabled=False)
    target = profiles.load_profile(profile)
    chosen = recipes.load_recipe(recipe) if recipe else None
    if passes:
        chosen = recipes.from_passes([recipes.parse_pass(item) if isinstance(item, str) else item for item in passes])
    chosen = checked(chosen, target) if chosen else None
    check_search(chosen, gates, search_options)
    check_target(output)
    _check_checkpoint(checkpoint, output)
    artifact = load(source)
    if artifact is None:
        raise UsageError(f"{source} is a checkpoint", hint="optimize takes ONNX; from a checkpoint: onnxpress build")
    with replacing(output) as stage, _beside(checkpoint) as folder:
        work = _begin(
            stage.work, artifact, target, Data(text, pairs, calibration or CalibrationData()), threads, progress
        )
        chosen = chosen or default_recipe(source, artifact, target, gates, search_options)
        chosen = with_our_operators(chosen, artifact)
        record = _press(
            artifact.source.name,
            work,
            stage,
            chosen,
            gates,
            benchmark,
            last_logits=False,
            search_options=search_options,
            checkpoint=folder,
        )
    return BuildResult(output, record, work.steps, tuple(work.notes))


def sensitivity(
    model: str,
    *,
    every: bool = False,
    structure: bool = False,
    heads: bool = False,
    kernel_table: KernelTable | None = None,
    **options: Any,
) -> Survey:
    """What each product of a model loses, weighs and takes in each format of a recipe, after the recipe's passes, and
    what each block loses with each of its cuts.

    Args:
        structure: try the cuts of the recipe `budget-structure` and no formats.
        heads: take out single attention heads, and try no formats.
        every: measure every loss, rather than infer those of finer formats from the coarsest one's that loses alike.
        options: those of `_prepared`.
    """
    from onnxpress.search.survey import survey

    mapped = structure or heads
    if mapped and options.get("recipe"):
        raise UsageError(
            "--structure and --heads are without a recipe", hint="the cuts of a recipe of your own are tried anyway"
        )
    with _prepared(model, default=STRUCTURE if mapped else None, **options) as (work, recipe):
        if mapped:
            recipe = replace(recipe, formats={}, cuts=recipe.cuts if structure else {})
        return survey(work, recipe, kernel_table, every=every, heads=heads)


def kernels(model: str, output: Path, **options: Any) -> KernelTable:
    """Time the kernels of a model's products on this machine and write the table to a file, see `sensitivity`."""
    from onnxpress.search.survey import time_kernels

    with _prepared(model, **options) as (work, recipe):
        table = time_kernels(work, recipe)
    with replacing_file(output) as path:
        path.write_text(table.to_json(), encoding="utf-8")
    return table


@contextmanager
def _prepared(
    model: str,
    *,
    profile: str = "cpu",
    recipe: str | None = None,
    default: str | None = None,
    calibration: CalibrationData | None = None,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Iterator[tuple[Work, Recipe]]:
    """A model after the passes of a recipe that are run before its cuts and formats, in a folder that goes away.

    default: the recipe where none is named; by default it depends on the model.
    """
    progress = progress or Progress(enabled=False)
    target = profiles.load_profile(profile)
    given = checked(recipes.load_recipe(recipe), target) if recipe else None
    if given is not None and not given.searched:
        raise UsageError(
            f"recipe {given.name} has no formats to choose from, and no cuts", hint="see [[format]] in `budget`"
        )
    flags = {"offline": offline, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    source = resolve(model, progress=progress, **flags)
    with tempfile.TemporaryDirectory(prefix="onnxpress-") as folder:
        data = Data(calibration=calibration or CalibrationData())
        work = _begin(Path(folder), source, target, data, threads, progress)
        chosen = given or checked(recipes.load_recipe(default or budget(work.artifact)), target)
        for spec, one in zip(chosen.passes, chosen.build(), strict=True):
            work.apply(spec, one)
        yield work, chosen


def _begin(
    folder: Path,
    source: Artifact | Checkpoint,
    target: Profile,
    data: Data,
    threads: int | None,
    progress: Progress,
    task: str | None = None,
    context_length: int | None = None,
    dtype: WeightType = "float32",
) -> Work:
    """source -> export: the graphs to start from, those of a checkpoint verified against it."""
    if isinstance(source, Artifact):
        if dtype != "float32":
            raise UsageError("--dtype is for checkpoints; this is ONNX already", hint="see: onnxpress list passes")
        return Work(folder, source, target, data, threads, progress)
    from onnxpress.exporter.export import export as export_checkpoint

    began = time.perf_counter()
    with progress.stage("exporting"):
        artifact = export_checkpoint(source, task=task, context_length=context_length, dtype=dtype)
    work = Work(folder, artifact, target, data, threads, progress)
    options = {} if dtype == "float32" else {"dtype": dtype}
    work.check_export(Step("export", options, time.perf_counter() - began, {"graphs": len(artifact.graphs)}), source)
    return work


def _press(
    model: str,
    work: Work,
    stage: Staging,
    recipe: Recipe | None,
    gates: Gates | None,
    benchmark: bool,
    *,
    last_logits: bool,
    search_options: SearchOptions | None = None,
    checkpoint: Path | None = None,
    originals: Mapping[str, TensorSource] | None = None,
) -> Manifest:
    """[pass -> verify]* -> evaluate -> gate -> package. Without a recipe nothing changes and nothing is measured.

    checkpoint: an empty folder to write the float model to. originals: the weights that it came from.
    """
    quality, gates = None, gates or Gates()
    if recipe is not None:
        gates = gates.of(graph_bytes(work.reference), work.structure.parameters if work.structure else None)
        for spec, one in zip(recipe.passes, recipe.build(), strict=True):
            work.apply(spec, one)
        if recipe.searched:
            from onnxpress.search.budget import search

            found = search(work, recipe, gates, search_options or SearchOptions())
            recipe, quality = found.recipe, found.quality
            work.notes += found.notes
        else:
            quality = work.evaluate()
        if checkpoint is not None:
            from onnxpress.build.checkpoint_output import write_checkpoint

            write_checkpoint(work, checkpoint, originals)
    # Quality needs the logits of every position; generation does not, so the others are cut off at the end.
    if last_logits and work.artifact.task.startswith("text-generation"):
        work.cut_logits()
    name = default_output(model).name.removesuffix("-onnx")
    return package(name, work, stage.result, recipe=recipe, quality=quality, gates=gates, benchmark=benchmark)


@contextmanager
def _beside(checkpoint: Path | None) -> Iterator[Path | None]:
    """An empty folder that becomes `checkpoint` if all goes well; None if none is wanted."""
    if checkpoint is None:
        yield None
        return
    with replacing(checkpoint, option="--checkpoint") as stage:
        yield stage.result


def _check_checkpoint(checkpoint: Path | None, output: Path) -> None:
    """Raise UsageError, before the long work, for a folder that cannot take a checkpoint."""
    if checkpoint is None:
        return
    check_target(checkpoint, option="--checkpoint")
    if checkpoint.resolve() == output.resolve():
        raise UsageError("--checkpoint and --output are the same folder", hint="give the checkpoint one of its own")
