"""The driver: source -> export -> [pass -> verify]* -> evaluate -> gate -> package -> artifact folder.

Every step writes its graph to a work folder beside the target and goes on from the file: what is measured is what is on
disk, and memory holds a few tensors, never the model. Nothing is put in place before every gate has passed.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from onnxpress import artifact_folder, manifest, measuring, overview
from onnxpress.artifact import Artifact, Step
from onnxpress.calibration import sample_feeds
from onnxpress.errors import NothingMatchedError, OnnxpressError, UsageError, VerificationError
from onnxpress.gates import Gates, require
from onnxpress.genai_config import write_genai_config
from onnxpress.golden import replay_golden, write_golden
from onnxpress.graph_io import load_graph, save_graph
from onnxpress.manifest import Manifest, StepRecord
from onnxpress.measuring import Data, Meter, available_memory, main_graph
from onnxpress.optimizers import recipe as recipes
from onnxpress.optimizers.base import Pass, Report
from onnxpress.optimizers.calibrate import CalibratedPass, Feeds
from onnxpress.optimizers.last_logits import LastLogits
from onnxpress.optimizers.recipe import PassSpec, Recipe
from onnxpress.progress import Progress
from onnxpress.report import before_after
from onnxpress.runtime_profiles import profile as profiles
from onnxpress.runtime_profiles.profile import Profile
from onnxpress.staging import Staging, check_target, replacing

if TYPE_CHECKING:
    from onnxpress.exporter.checkpoint import Checkpoint
    from onnxpress.exporter.onnx_source import OnnxSource


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
    benchmark: bool = True,
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

    Raises UsageError, BadInputError, GateFailedError, VerificationError or OutputError; then nothing is written and an
    artifact that stood at `output` is untouched.
    """
    progress = progress or Progress(enabled=False)
    target_profile = profiles.load(profile)
    chosen = recipes.load(recipe).resolve(target_profile.auto) if recipe else None
    if chosen is not None:
        chosen.build()  # a wrong option shows before the long work
    output = output or default_output(model)
    check_target(output)
    with progress.stage(f"resolving {model}"):
        source = resolve(
            model, offline=offline, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, progress=progress
        )
    with replacing(output) as stage:
        # All logits until the end: quality needs them, and then the others are cut off.
        artifact, step, checkpoint = _exported(source, task, context_length, progress)
        chosen = chosen or _default_recipe(model, artifact.task, target_profile)
        run = _Run(stage, artifact, target_profile, Data(text, pairs), threads, progress)
        run.last_only = logits != "all" and artifact.task.startswith("text-generation")
        run.begin(step, checkpoint)
        for spec, one in zip(chosen.passes, chosen.build(), strict=True):
            run.apply(spec, one)
        record = run.package(model, chosen, gates or Gates(), benchmark)
    return BuildResult(output, record, run.steps, tuple(run.notes))


def export(
    model: str,
    *,
    output: Path | None = None,
    task: str | None = None,
    logits: Logits | None = None,
    context_length: int | None = None,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Only the export: an artifact with the fp32 graph, verified against the checkpoint."""
    progress = progress or Progress(enabled=False)
    output = output or default_output(model)
    check_target(output)
    with progress.stage(f"resolving {model}"):
        source = resolve(
            model, offline=offline, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, progress=progress
        )
    with replacing(output) as stage:
        artifact, step, checkpoint = _exported(source, task, context_length, progress)
        run = _Run(stage, artifact, ANY_TARGET, Data(), threads, progress)
        run.last_only = logits == "last" and artifact.task.startswith("text-generation")
        run.begin(step, checkpoint)
        record = run.package(model, None, Gates(), benchmark=False)
    return BuildResult(output, record, run.steps, tuple(run.notes))


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
    benchmark: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Run passes on an artifact or on an ONNX graph made by anyone; the reference is what came in."""
    if passes and recipe:
        raise UsageError("--pass and --recipe exclude each other")
    progress = progress or Progress(enabled=False)
    target_profile = profiles.load(profile)
    chosen = recipes.load(recipe) if recipe else None
    if passes:
        specs = [recipes.parse_pass(item) if isinstance(item, str) else item for item in passes]
        chosen = recipes.from_passes(specs)
    if chosen is not None:
        chosen = chosen.resolve(target_profile.auto)
        chosen.build()
    check_target(output)
    artifact = load(source)
    if artifact is None:
        raise UsageError(f"{source} is a checkpoint", hint="optimize takes ONNX; from a checkpoint: onnxpress build")
    chosen = chosen or _default_recipe(source, artifact.task, target_profile)
    with replacing(output) as stage:
        run = _Run(stage, artifact, target_profile, Data(text, pairs), threads, progress)
        run.begin(None, None)
        for spec, one in zip(chosen.passes, chosen.build(), strict=True):
            run.apply(spec, one)
        record = run.package(artifact.source.name, chosen, gates or Gates(), benchmark)
    return BuildResult(output, record, run.steps, tuple(run.notes))


def resolve(model: str, *, progress: Progress | None = None, **flags: bool) -> Artifact | Checkpoint:
    """An Artifact for ONNX (ours or anyone's), a Checkpoint for everything else."""
    from onnxpress.exporter import source as sources

    if manifest.is_artifact(Path(model)):
        return artifact_folder.load(Path(model))
    found = sources.resolve(model, progress=progress.message if progress else None, **flags)
    if isinstance(found, sources.OnnxSource):
        return _foreign(found)
    return found


def load(source: str) -> Artifact | None:
    """An artifact or a foreign graph; None for a checkpoint."""
    found = resolve(source)
    return found if isinstance(found, Artifact) else None


def default_output(model: str) -> Path:
    """`./NAME-onnx`, NAME being the last part of what the model is called by."""
    last = re.split(r"[/:]", model.split("@")[0].rstrip("/"))[-1]
    stem = re.sub(r"\.(gguf|onnx)$", "", last)
    return Path(f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem).strip('.-') or 'model'}-onnx")


@dataclass
class _Run:
    """One build between its work folder and its result."""

    stage: Staging
    artifact: Artifact
    profile: Profile
    data: Data
    threads: int | None
    progress: Progress
    notes: list[str] = field(default_factory=list)
    reference: dict[str, Path] = field(default_factory=dict)
    """The graphs that quality is measured against, by stem."""
    current: dict[str, Path] = field(default_factory=dict)
    last_only: bool = False
    """Whether the artifact's decoder is to compute the last position's logits only."""
    lossy: bool = False
    """Whether a pass before was not exact."""
    samples: Sequence[Feeds] = ()
    """Inputs for passes that look at activations."""
    _meter: Meter | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.artifact.history

    def begin(self, step: Step | None, checkpoint: Checkpoint | None) -> None:
        """Write the graphs as they came and verify them against the checkpoint, where there is one."""
        artifact_folder.write_companions(self.artifact, self.stage.work)
        self.notes += [
            f"{part} is not fused: {reason}" for part, reason in self.artifact.export.get("not_fused", {}).items()
        ]
        began = time.perf_counter()
        self.reference = self.current = self._save(self.artifact.graphs, "exporting")
        seconds = time.perf_counter() - began
        self._meter = Meter(self.reference, self.data, self.threads, dict(self.profile.session_options))
        if step is None or checkpoint is None:
            return
        metrics: Mapping[str, float] = {}
        needed = 4 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
        if needed > available_memory() / 2:
            self.notes.append(
                f"the export was not verified against torch: the checkpoint takes {needed / 1e9:.0f} GB of memory"
            )
        else:
            with self.progress.stage("verifying the export against the checkpoint"):
                metrics = self._meter.check_export(checkpoint, self.artifact.task)
        self._record(replace(step, seconds=step.seconds + seconds, metrics=metrics))

    def apply(self, spec: PassSpec, one: Pass) -> None:
        """Run one pass on every graph, write the result, verify it. Raises NothingMatchedError, VerificationError."""
        assert self._meter is not None
        began = time.perf_counter()
        graphs = {stem: load_graph(path) for stem, path in self.current.items()}
        matched: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        if isinstance(one, CalibratedPass) and one.needs_samples:
            with self.progress.stage("sampling inputs"):
                self.samples = one.samples = self.samples or sample_feeds(main_graph(self.reference), self.threads)
        with self.progress.stage(spec.name):
            for model in graphs.values():
                report = _run_pass(one, model)
                matched += report.matched
                skipped += report.skipped
        step = Step(spec.name, dict(spec.options), 0.0, dict(matched), dict(skipped))
        if not matched:
            if not spec.optional:
                reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3))
                raise NothingMatchedError(
                    f"{spec.name} found nothing to do{': ' + reasons if reasons else ''}",
                    hint="leave it out, or mark it optional = true in the recipe",
                )
            self._record(replace(step, seconds=time.perf_counter() - began))
            return
        metrics = self._proceed(graphs, spec.name, exact=one.exact)
        self._record(replace(step, seconds=time.perf_counter() - began, metrics=metrics))

    def package(self, name: str, chosen: Recipe | None, gates: Gates, benchmark: bool) -> Manifest:
        """Write the artifact to the stage, measure it, hold it to the gates. Raises GateFailedError."""
        assert self._meter is not None
        result = self.stage.result
        before: dict[str, float] = {"size_bytes": float(_bytes(self.reference))}
        after: dict[str, float] = {}
        if chosen is not None:
            with self.progress.stage("measuring quality") as update:
                quality = self._meter.evaluate(self.current, update)
            after |= measuring.figures(quality)
            if quality.reference_perplexity is not None:
                before["perplexity"] = quality.reference_perplexity
        if self.last_only:
            self._cut_logits()
        graphs = {stem: load_graph(path) for stem, path in self.current.items()}
        with self.progress.stage("writing the artifact") as update:
            paths = artifact_folder.write_graphs(graphs, result, progress=update)
        artifact_folder.write_companions(self.artifact, result)
        after["size_bytes"] = float(artifact_folder.size_bytes(result))
        for stem, model in graphs.items():
            self.notes += overview.objections(paths[stem].name, model, self.profile)
        if chosen is not None and (benchmark or gates.need_benchmark):
            with self.progress.stage("measuring speed and memory"):
                before |= measuring.speed(self.reference, self.threads, self.profile.session_options)
                after |= measuring.speed(paths, self.threads, self.profile.session_options)
        checked = gates.check(after)
        require(checked, before, self.steps)
        record = Manifest(
            name=default_output(name).name.removesuffix("-onnx"),
            task=self.artifact.task,
            model_type=self.artifact.config.get("model_type"),
            source=manifest.source_record(self.artifact.source),
            export=dict(self.artifact.export),
            profile=self.profile.name,
            session_options=dict(self.profile.session_options),
            recipe=chosen.to_dict() if chosen else None,
            steps=[StepRecord.of(step) for step in self.steps],
            before=before if chosen else {},
            metrics=after,
            gates=checked,
            machine=manifest.machine(),
            versions=manifest.versions(),
        )
        for stem, model in graphs.items():
            if stem == "model":
                name_inside = paths[stem].relative_to(result).as_posix()
                write_genai_config(result, model, name_inside, self.artifact.config, self.profile.session_options)
        artifact_folder.write_card(result, record, before_after(record.before, record.metrics))
        (result / manifest.MANIFEST).write_text(record.to_json(), encoding="utf-8")  # it says how to open the graph
        with self.progress.stage("recording golden outputs"):
            write_golden(result, threads=self.threads)
        with self.progress.stage("hashing"):
            record = record.model_copy(update={"files": manifest.hash_files(result)})
        (result / manifest.MANIFEST).write_text(record.to_json(), encoding="utf-8")
        return record

    def _cut_logits(self) -> None:
        """Keep the logits of the last position only, where the graph has a head that can be cut."""
        assert self._meter is not None
        began = time.perf_counter()
        graphs = {stem: load_graph(path) for stem, path in self.current.items()}
        reports = [_run_pass(LastLogits(), model) for model in graphs.values()]
        matched = sum((report.matched for report in reports), Counter[str]())
        skipped = sum((report.skipped for report in reports), Counter[str]())
        step = Step(LastLogits.name, {}, 0.0, dict(matched), dict(skipped))
        if matched:
            before, self.current = self.current, self._save(graphs, LastLogits.name)
            with self.progress.stage(f"verifying {LastLogits.name}"):
                step = replace(step, metrics=self._meter.check_last(self.current, before, lossy=self.lossy))
        self._record(replace(step, seconds=time.perf_counter() - began))

    def _proceed(self, graphs: Mapping[str, ir.Model], name: str, *, exact: bool) -> dict[str, float]:
        """Write what a pass made, verify it, and go on from there; returns what verification measured."""
        assert self._meter is not None
        before, self.current = self.current, self._save(graphs, name)
        with self.progress.stage(f"verifying {name}"):
            metrics = self._meter.check_step(name, self.current, before, exact=exact, lossy=self.lossy)
        self.lossy |= not exact
        return metrics

    def _save(self, graphs: Mapping[str, ir.Model], title: str) -> dict[str, Path]:
        """Write graphs to the work folder under a number of their own; weights that did not change are not copied."""
        folder = self.stage.work / artifact_folder.GRAPHS
        folder.mkdir(exist_ok=True)
        number = len(list(folder.glob("*.onnx")))
        paths = {}
        for stem, model in graphs.items():
            paths[stem] = folder / f"{stem}_{number:02}.onnx"
            with self.progress.stage(f"{title}: writing") as update:
                save_graph(model, paths[stem], external_data=f"{paths[stem].name}_data", progress=update, reuse=folder)
        return paths

    def _record(self, step: Step) -> None:
        if step.metrics:
            step = replace(step, metrics={**step.metrics, "size_bytes": float(_bytes(self.current))})
        self.artifact = self.artifact.with_step(step)


def _run_pass(one: Pass, model: ir.Model) -> Report:
    try:
        return one.call(model).report
    except OnnxpressError:
        raise
    except Exception as error:
        raise VerificationError(f"pass {one.name} failed: {type(error).__name__}: {error}") from error


def _exported(
    source: Artifact | Checkpoint, task: str | None, context_length: int | None, progress: Progress
) -> tuple[Artifact, Step | None, Checkpoint | None]:
    """The artifact to begin with, the step that made it, and the checkpoint to verify it against."""
    if isinstance(source, Artifact):
        return source, None, None
    from onnxpress.exporter.export import export as export_checkpoint

    began = time.perf_counter()
    with progress.stage("exporting"):
        artifact = export_checkpoint(source, task=task, context_length=context_length)
    step = Step("export", {}, time.perf_counter() - began, {"graphs": len(artifact.graphs)})
    return artifact, step, source


def _default_recipe(model: str, task: str, profile: Profile) -> Recipe:
    from onnxpress.models.catalog import load_catalog

    entry = load_catalog().get(model)
    name = entry.recipe_for(profile.name) if entry else None
    return recipes.load(name or profile.recipe_for(task)).resolve(profile.auto)


def _foreign(found: OnnxSource) -> Artifact:
    """A graph that someone else made, with the files beside it."""
    graphs = {stem: load_graph(path) for stem, path in found.graphs.items()}
    return Artifact(
        task=_task(graphs, found.config),
        graphs=graphs,
        config=found.config,
        files=found.files,
        source=found.source,
        export={"method": "foreign", "layout": found.layout},
    )


def _task(graphs: Mapping[str, ir.Model], config: Mapping[str, Any]) -> str:
    """optimum's task name: what config.json says, else what the inputs and outputs look like."""
    if config.get("architectures") and config.get("model_type"):
        from onnxpress.exporter.tasks import infer_task

        return infer_task(SimpleNamespace(architectures=config["architectures"], model_type=config["model_type"]))
    if any(stem.startswith("encoder_model") for stem in graphs):
        return "text2text-generation"
    graph = next(iter(graphs.values())).graph
    caches = any((value.name or "").startswith("past_key_values.") for value in graph.inputs)
    return "text-generation" if caches else "feature-extraction"


def _bytes(paths: Mapping[str, Path]) -> int:
    """Bytes of the weights that graphs refer to, and of the graphs: what their own files would take."""
    return sum(artifact_folder.weight_bytes(load_graph(path)) for path in paths.values())


def evaluate(
    model: str,
    *,
    reference: str | None = None,
    text: Path | None = None,
    pairs: Path | None = None,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two of {artifact, ONNX, checkpoint}; the default reference is the source that the artifact names."""
    from onnxpress.evaluation import evaluate as measure

    progress = progress or Progress(enabled=False)
    if reference is None:
        if not manifest.is_artifact(Path(model)):
            raise UsageError(f"{model} is not an artifact: it names no source", hint="give one with --reference")
        reference = manifest.read(Path(model)).source.name
    flags = {"offline": offline, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    sides = [_measurable(side, flags, progress) for side in (model, reference)]
    with progress.stage("evaluating") as update:
        found = measure(*sides, text=text, pairs=pairs, threads=threads, progress=lambda what, *done: update(*done))
    return found.to_dict()


def benchmark(
    folder: Path,
    *,
    profile: str | None = None,
    operators: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed and memory of an artifact or an ONNX file, with the session options of `profile` or of the artifact."""
    from onnxpress.benchmark import benchmark as measure

    progress = progress or Progress(enabled=False)
    options = dict(profiles.load(profile).session_options) if profile else None
    with progress.stage("measuring speed and memory"):
        return measure(folder, threads=threads, session_options=options, profile=operators).to_dict()


def verify(folder: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Check the files of an artifact and replay its golden outputs. Raises VerificationError where either fails."""
    progress = progress or Progress(enabled=False)
    record = manifest.read(folder)
    with progress.stage("hashing"):
        manifest.check_files(folder, record.files)
    with progress.stage("replaying golden outputs"):
        replayed = replay_golden(folder)
    return {"files": len(record.files), **replayed}


def _measurable(model: str, flags: Mapping[str, bool], progress: Progress) -> Any:
    """What `onnxpress.evaluation` can open: a path to ONNX or an artifact, or a Checkpoint."""
    path = Path(model)
    if path.suffix == ".onnx" or manifest.is_artifact(path):
        return path
    with progress.stage(f"resolving {model}"):
        found = resolve(model, progress=progress, **flags)
    return path if isinstance(found, Artifact) else found
