"""The graphs of one build on their way through the passes.

Every step writes its graph to the work folder and goes on from the file: what is measured is what is on disk, and
memory holds a few tensors, never the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir

from onnxpress.arrays import Feeds
from onnxpress.artifact import folder as artifact_folder
from onnxpress.artifact.artifact import Artifact, Step
from onnxpress.artifact.reduced_config import reduced_config, renewed
from onnxpress.artifact.structure import EXPORT_KEY, Structure, StructureChange, read_structure
from onnxpress.artifact.structure_changes import list_changes
from onnxpress.building.measuring import Meter, main_graph
from onnxpress.calibration.calibration import Calibration
from onnxpress.calibration.data import calibration_folder
from onnxpress.calibration.known_results import KnownResults
from onnxpress.errors import NothingMatchedError, OnnxpressError, VerificationError
from onnxpress.evaluation.evaluate import Evaluation
from onnxpress.graph.conventions import DECODER, DECODER_WITH_PAST
from onnxpress.graph.io import load_graph, save_graph
from onnxpress.graph.report import Report
from onnxpress.optimizers.base import Context, Pass
from onnxpress.optimizers.fusion.last_logits import LastLogits
from onnxpress.optimizers.recipe import PassSpec
from onnxpress.progress import Progress
from onnxpress.requests import Judging
from onnxpress.runtime.memory import available_memory, trim_memory
from onnxpress.runtime_profiles.profile import Profile

if TYPE_CHECKING:
    from onnxpress.exporter.sources.checkpoint import Checkpoint


ONNX_ONLY = "ONNX only: "
"""What notes begin with that say why no configuration can tell the structure."""


class Mark(NamedTuple):
    """A state of the work."""

    artifact: Artifact
    current: Mapping[str, Path]
    lossy: bool
    sidecar_folder: Path
    structure: Structure | None
    float_graphs: Mapping[str, Path] | None
    notes: tuple[str, ...]


@dataclass
class Work:
    """Graphs as files, what they are measured against, and the steps so far."""

    folder: Path
    """For intermediate files; it goes away."""
    artifact: Artifact
    """As it came, plus a Step for everything that was done since."""
    profile: Profile
    judging: Judging
    progress: Progress
    notes: list[str] = field(default_factory=list)
    """What the user should know: a fallback, something that the target minds."""
    reference: Mapping[str, Path] = field(init=False)
    """The graphs that quality is measured against, by name."""
    current: Mapping[str, Path] = field(init=False)
    meter: Meter = field(init=False)
    sidecar_folder: Path = field(init=False)
    """The folder of the current graphs' sidecar files; a pass that changes these begins another."""
    lossy: bool = False
    """Whether a pass before was not exact."""
    structure: Structure | None = field(init=False)
    """The structure of the float graphs; None where no layers are recognised."""
    float_graphs: Mapping[str, Path] | None = field(init=False)
    """The graphs as they were last while every product was a float one under its own name."""
    samples: dict[tuple[int, int], Mapping[str, Sequence[Feeds]]] = field(default_factory=dict)
    """Inputs for passes that look at activations: for each graph, by rows and length that a pass asked for."""

    def __post_init__(self) -> None:
        """Write the graphs as they came."""
        self.sidecar_folder = self.folder
        artifact_folder.write_sidecar_files(self.artifact, self.sidecar_folder)
        not_fused = self.artifact.export.get("not_fused", {})
        self.notes += [f"{part} is not fused: {reason}" for part, reason in not_fused.items()]
        self.reference = self.current = self._save(self.artifact.graphs, "exporting")
        self.meter = Meter(self.reference, self.judging, dict(self.profile.session_options))
        self.structure = read_structure(self.artifact.graphs.values()) if _is_float(self.artifact.graphs) else None
        self.float_graphs = self.current if self.structure is not None else None

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.artifact.history

    def check_export(self, step: Step, checkpoint: Checkpoint) -> None:
        """Verify against torch what `step` exported, if memory holds the checkpoint. Raises VerificationError."""
        metrics: Mapping[str, float] = {}
        needed = 4 * sum(tensor.size for tensor in checkpoint.tensors.values())
        if needed > available_memory() / 2:
            self.notes.append(
                f"the export was not verified against torch: the checkpoint takes {needed / 1e9:.0f} GB of memory"
            )
        else:
            with self.progress.stage("verifying the export against the checkpoint"):
                rounded = bool(self.artifact.export.get("rounded"))
                metrics = self.meter.check_export(checkpoint, self.artifact.task, exact=not rounded)
            trim_memory()
        self.record(replace(step, metrics=metrics))

    def apply(self, spec: PassSpec, graph_pass: Pass, known: KnownResults | None = None) -> None:
        """Run one pass on every graph, write the result, verify it. Raises NothingMatchedError, VerificationError.

        Args:
            known: results of the same pass in earlier runs, which is added to; the caller discards it. Without it
                nothing is kept once the graphs are written.
        """
        began = time.perf_counter()
        samples = self._samples_for(graph_pass)
        results = KnownResults() if known is None else known
        with self.progress.stage(spec.name) as update:
            calibrations = self._calibrations(samples, update)
            graphs, report = self._run(graph_pass, calibrations, results)
        step = Step(spec.name, dict(spec.options), 0.0, dict(report.matched), dict(report.skipped))
        if report.errors:
            step = replace(step, errors=dict(report.errors))
        if report.matched:
            self._follow_beside(graph_pass)
            self.notes += report.notes
            before, self.current = self.current, self._save(graphs, spec.name)
            if graph_pass.gives_form and not self.lossy and _is_float(graphs):
                self.structure = read_structure(graphs.values())
                self.float_graphs = self.current if self.structure is not None else None
            elif self.float_graphs == before:
                self._follow(graph_pass, graphs)
            results.keep_files(calibrations.values())
            if known is None:
                results.discard()  # what was found is in the graphs' files
            with self.progress.stage(f"verifying {spec.name}"):
                metrics = self.meter.check_step(
                    spec.name, self.current, before, exact=graph_pass.exact, lossy=self.lossy
                )
            trim_memory()
            step = replace(step, metrics=metrics)
            self.lossy |= not graph_pass.exact
        elif not spec.optional:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in report.skipped.most_common(3))
            raise NothingMatchedError(
                f"{spec.name} found nothing to do{': ' + reasons if reasons else ''}",
                hint="leave it out, or mark it optional = true in the recipe",
            )
        self.record(replace(step, seconds=time.perf_counter() - began))

    def _run(
        self, graph_pass: Pass, calibrations: Mapping[str, Calibration], known: KnownResults
    ) -> tuple[dict[str, ir.Model], Report]:
        """Every graph after the pass, and what was done to all of them."""
        graphs = {name: load_graph(path) for name, path in self.current.items()}
        total = Report()
        for name, model in graphs.items():
            calibration = calibrations.get(name, Calibration())
            reference = load_graph(self.reference[name]) if graph_pass.needs_reference else None
            try:
                report = graph_pass.run(model, Context(calibration, reference, self.artifact, known)).report
            except OnnxpressError:
                raise
            except Exception as error:
                raise VerificationError(f"pass {graph_pass.name} failed: {type(error).__name__}: {error}") from error
            total.add(report)
        return graphs, total

    def _follow_beside(self, graph_pass: Pass) -> None:
        """Let what lies beside the graphs follow a pass, in a folder of its own if anything changes."""
        folder = self.folder / f"sidecar-files-{len(self.steps)}"
        artifact = graph_pass.follow(self.artifact, folder)
        if artifact is self.artifact:
            return
        self.artifact, self.sidecar_folder = artifact, folder
        artifact_folder.write_sidecar_files(self.artifact, self.sidecar_folder)
        self.samples.clear()

    def _follow(self, graph_pass: Pass, graphs: Mapping[str, ir.Model]) -> None:
        """Let config.json say what the structure of float graphs is by now.

        An exact pass that gives products other names packs them, and a pass that is not float quantizes: these change
        how the model is stored, not its structure, and what comes after them is not followed.
        """
        structure = read_structure(graphs.values()) if _is_float(graphs) else None
        if structure is None or self.structure is None or (graph_pass.exact and structure.names - self.structure.names):
            return
        export = self.artifact.export
        changed = reduced_config(self.artifact.config, self.structure, structure)
        earlier = StructureChange.of(export)
        before = earlier.before if earlier else self.structure
        reasons = renewed(earlier.onnx_only if earlier else (), changed.onnx_only)
        if reasons or list_changes(before, structure):
            export = {**export, EXPORT_KEY: StructureChange(before, structure, tuple(reasons)).to_dict()}
        self.artifact = replace(self.artifact, config=changed.config, export=export)
        said = (note.removeprefix(ONNX_ONLY) for note in self.notes if note.startswith(ONNX_ONLY))
        others = [note for note in self.notes if not note.startswith(ONNX_ONLY)]
        self.notes = [*others, *(ONNX_ONLY + reason for reason in renewed(said, changed.onnx_only))]
        self.structure, self.float_graphs = structure, self.current
        artifact_folder.write_sidecar_files(self.artifact, self.sidecar_folder)

    def _samples_for(self, graph_pass: Pass) -> Mapping[str, Sequence[Feeds]] | None:
        """Inputs of each graph, by its name or "", for a pass that looks at activations."""
        if not graph_pass.needs_samples:
            return None
        wanted = (graph_pass.wanted_rows, graph_pass.wanted_length)
        if wanted not in self.samples:
            with self.progress.stage("sampling inputs"):
                self.samples[wanted] = self.judging.calibration.feeds(
                    main_graph(self.reference), *wanted, self.judging.threads, self.sidecar_folder
                )
            trim_memory()
        return self.samples[wanted]

    def _calibrations(
        self, samples: Mapping[str, Sequence[Feeds]] | None, progress: Callable[[int, int], None]
    ) -> dict[str, Calibration]:
        """Samples of each graph, by its name, and what may be spent on them."""
        if samples is None:
            return {}
        folder = calibration_folder()
        return {
            name: Calibration(
                samples.get(name, samples.get("", ())), folder, threads=self.judging.threads, progress=progress
            )
            for name in self.current
        }

    def mark(self) -> Mark:
        """Note where the work stands, to come back to; the files stay."""
        state = (self.artifact, self.current, self.lossy, self.sidecar_folder, self.structure, self.float_graphs)
        return Mark(*state, tuple(self.notes))

    def restore(self, mark: Mark) -> None:
        self.artifact, self.current, self.lossy, self.sidecar_folder, self.structure, self.float_graphs, notes = mark
        self.notes = list(notes)

    def evaluate(self) -> Evaluation:
        """The quality that the artifact is judged by."""
        with self.progress.stage("measuring quality") as update:
            return self.meter.evaluate(self.current, update)

    def cut_logits(self) -> None:
        """Keep the logits of the last position only, where the graph has a head that can be cut."""
        began = time.perf_counter()
        graphs, report = self._run(LastLogits(), {}, KnownResults())
        step = Step(LastLogits.name, {}, 0.0, dict(report.matched), dict(report.skipped))
        if report.matched:
            before, self.current = self.current, self._save(graphs, LastLogits.name)
            with self.progress.stage(f"verifying {LastLogits.name}"):
                step = replace(step, metrics=self.meter.check_last(self.current, before, lossy=self.lossy))
        self.record(replace(step, seconds=time.perf_counter() - began))

    def check_merged(self, written: Mapping[str, Path]) -> None:
        """Verify the merged decoder among the `written` graphs against the two decoders. Raises VerificationError."""
        began = time.perf_counter()
        with self.progress.stage("verifying the merged decoder"):
            metrics = self.meter.check_merged(written, self.current)
        self.record(Step("merge-decoders", {}, time.perf_counter() - began, {"decoders": 2}, metrics=metrics))

    def _save(self, graphs: Mapping[str, ir.Model], title: str) -> dict[str, Path]:
        """Write graphs to the work folder under a number of their own; weights that did not change are not copied."""
        folder = self.sidecar_folder / artifact_folder.GRAPHS
        folder.mkdir(exist_ok=True)
        number = len(list(folder.glob("*.onnx")))
        paths = {}
        for name, model in graphs.items():
            paths[name] = folder / f"{name}_{number:02}.onnx"
            with self.progress.stage(f"{title}: writing") as update:
                save_graph(model, paths[name], external_data=f"{paths[name].name}_data", progress=update, reuse=folder)
        return paths

    def record(self, step: Step) -> None:
        """Add a step to the history."""
        if step.metrics:
            step = replace(step, metrics={**step.metrics, "size_bytes": float(graph_bytes(self.current))})
        self.artifact = self.artifact.with_step(step)


def _is_float(graphs: Mapping[str, ir.Model]) -> bool:
    """Whether all weights are float32."""
    return all(set(artifact_folder.weight_formats(model)) <= {"float32"} for model in graphs.values())


def graph_bytes(paths: Mapping[str, Path]) -> int:
    """Bytes of the weights that the graphs of a model refer to; two decoders of one model share theirs."""
    models = {name: load_graph(path) for name, path in paths.items()}
    decoders = [models.pop(name) for name in (DECODER, DECODER_WITH_PAST) if name in models]
    return sum(map(artifact_folder.weight_bytes, models.values())) + artifact_folder.weight_bytes(*decoders)
