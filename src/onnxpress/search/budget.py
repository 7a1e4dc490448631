"""The budgeted search: limits in, the best mix of cuts and formats out.

A mix is predicted, built, measured, and the prediction mended where it was off.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from onnxpress.artifact.artifact import Step
from onnxpress.artifact.folder import graph_file_bytes, write_graphs
from onnxpress.building.measuring import speed
from onnxpress.building.work import Mark, Work
from onnxpress.calibration.known_results import KnownResults
from onnxpress.errors import DestroyedError, GateFailedError, UsageError
from onnxpress.evaluation.evaluate import Evaluation
from onnxpress.graph.io import load_graph
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.recipe import PassSpec, Recipe
from onnxpress.requests import Gates, SearchOptions
from onnxpress.search import kernels
from onnxpress.search.assignment import Assignment, Program
from onnxpress.search.block_cuts import numbering
from onnxpress.search.formats import FLOAT
from onnxpress.search.prediction import Prediction
from onnxpress.search.selection import best_choice, most_alike
from onnxpress.search.sensitivity_profile import SensitivityProfile, cut_name, measure_profile

ROUNDS = 4
"""Assignments that are built and measured, at most."""
CLOSE = 0.85
"""A loss that uses this much of what is allowed is close enough."""
LAST_NODES = 2048
"""Bytes of the nodes that are added when logits are cut to the last position."""


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search."""

    recipe: Recipe
    """With a pass for each cut and format that was chosen, by names of weights: it builds the same again without a
    search."""
    quality: Evaluation
    notes: list[str] = field(default_factory=list)


def search(work: Work, recipe: Recipe, gates: Gates, options: SearchOptions) -> SearchResult:
    """Choose cuts and formats so that the gates hold, build and measure; the work is left with the best that was found.

    What has no limit is made as good as it gets, see `SearchOptions.minimize`. Where nothing but the number of
    parameters is asked for, everything stays float32.

    Raises GateFailedError, with what would be possible, where no assignment meets the limits.
    """
    began = time.perf_counter()
    if recipe.cuts and work.float_graphs != work.current:
        raise UsageError(
            f"recipe {recipe.name} packs or quantizes weights before anything is cut",
            hint="leave pack-projections and the like out of its [[pass]] tables, or leave out [[cut]]",
        )
    notes = []
    if recipe.formats and options.minimize is None and gates == Gates(max_parameters=gates.max_parameters):
        recipe = replace(recipe, formats={})
        notes.append("float32 throughout: no limit asks for less than that (--max-size, --max-loss)")
    known = measure_profile(work, recipe, options.kernel_table)
    decoder = work.artifact.task.startswith("text-generation")
    program = known.program(recipe.importance, kernels.TOKENS[0] if decoder else kernels.TOKENS[-1])
    prediction, objective = _first_prediction(work, gates, program), options.objective(gates)
    builder = _Builder(work, known, recipe)
    best: tuple[float, Mark, Assignment, Evaluation, Recipe] | None = None
    destroyed: DestroyedError | None = None
    tried: list[Assignment] = []
    with contextlib.closing(builder):
        while len(tried) < ROUNDS:
            expected = prediction.expected(program)
            choose = most_alike if best is not None and best[2].cuts and objective == "loss" else best_choice
            assignment = choose(expected, prediction.limits(gates), objective)
            if assignment is None or assignment in tried:
                break
            tried.append(assignment)
            try:
                chosen, on_cuts = builder.build(assignment)
            except DestroyedError as error:
                destroyed = error
                prediction.distrust(bool(assignment.cuts))
                continue
            quality, sums = work.evaluate(), program.totals(assignment)
            measured = _measured(work, quality, gates)
            prediction.learn(sums, measured | {"spent_on_cuts": measured["spent"] if on_cuts is None else on_cuts})
            if all(gate.passed for gate in gates.check(measured)):
                score = measured["spent"] if objective == "loss" else sums[objective]
                if best is None or score < best[0]:
                    best = (score, work.mark(), assignment, quality, chosen)
                if objective == "loss":
                    if choose is most_alike or not assignment.cuts:
                        break
                elif gates.max_loss is None or measured["spent"] >= CLOSE * math.log1p(gates.max_loss):
                    break
    remarks = prediction.remarks() if destroyed is None else []
    expected = prediction.expected(program)
    if best is None and destroyed is not None:
        raise GateFailedError(
            "gate failed: of what meets the limits, nothing works any more; nothing was written", hint=str(destroyed)
        )
    if best is None:
        raise _failure(expected, prediction, gates)
    _, state, assignment, quality, chosen = best
    work.restore(state)
    limits = {name: value for name, value in vars(gates).items() if value is not None}
    work.record(Step("search", limits, time.perf_counter() - began, known.count(assignment)))
    notes += [*remarks, *_further(expected, prediction, gates, objective, assignment)]
    return SearchResult(chosen, quality, notes)


@dataclass
class _Builder:
    """Puts assignments into graphs, always from the same start."""

    work: Work
    known: SensitivityProfile
    recipe: Recipe

    def __post_init__(self) -> None:
        self.start = self.work.mark()
        self.results: dict[str, KnownResults] = {}
        """By format: what was fitted in a round before need not be fitted again."""
        self.cut: dict[tuple[str, ...], tuple[Mark, list[PassSpec]]] = {(): (self.start, [])}
        """The start after cuts that a round before made, and how it made them."""

    def close(self) -> None:
        for results in self.results.values():
            results.discard()

    def build(self, assignment: Assignment) -> tuple[Recipe, float | None]:
        """Run the passes of the cuts, each format's on the weights that it was chosen for, and those after.

        Returns this as a recipe; and what the cuts alone spend, see `_measured`, None where nothing else was done.
        """
        if assignment.cuts not in self.cut:
            self.cut[assignment.cuts] = self._make_cuts(assignment.cuts)
        state, cuts = self.cut[assignment.cuts]
        self.work.restore(state)
        rounded = any(format != FLOAT for format in assignment.formats.values())
        on_cuts = 0.0 if not cuts else _spent(self.work.evaluate()) if rounded else None
        specs = [*cuts, *self._apply_formats(assignment)]
        after = self.recipe.after
        for spec in after:
            self.work.apply(spec, spec.build())
        passes = (*self.recipe.passes, *specs, *after)
        return replace(self.recipe, passes=passes, formats={}, cuts={}, importance={}, after=()), on_cuts

    def _make_cuts(self, names: Sequence[str]) -> tuple[Mark, list[PassSpec]]:
        """Blocks are removed first, so that the others are fitted to what they read by then."""
        self.work.restore(self.start)
        specs: list[PassSpec] = []
        name_of = self._numbering(names)
        for cut in sorted(self.known.cuts, key=lambda cut: not cut.removes):
            blocks = [block for block in self.known.candidates if cut_name(block.name, cut.name) in names]
            if not blocks:
                continue
            changed = [self.known.cut_groups[cut_name(block.name, cut.name)] for block in blocks]
            groups = [group for by_name in changed for group in by_name.values()]
            weights = [weight if cut.removes else name_of(weight) for group in groups for weight in group.weights]
            for spec, graph_pass in cut.passes_at(blocks, weights):
                self.work.apply(spec, graph_pass)
                specs.append(spec)
        return self.work.mark(), specs

    def _numbering(self, cuts: Sequence[str]) -> Callable[[str], str]:
        """Return a function from what weights are called to what they are called after cuts."""
        removals = [cut.name for cut in self.known.cuts if cut.removes]
        blocks = self.known.candidates
        removed = [block for block in blocks if any(cut_name(block.name, one) in cuts for one in removals)]
        return numbering(blocks, removed)

    def _apply_formats(self, assignment: Assignment) -> list[PassSpec]:
        name_of = self._numbering(assignment.cuts)
        groups = {group.name: group for group in self.known.groups}
        specs: list[PassSpec] = []
        first: list[tuple[PassSpec, Pass, KnownResults]] = []
        """What formats begin with and is exact: on a graph that nothing was rounded in, verification can tell."""
        rest: list[tuple[PassSpec, Pass, KnownResults]] = []
        for format in self.known.formats:
            named = [name for name, chosen in assignment.formats.items() if chosen == format.name]
            weights = [name_of(weight) for name in named for weight in groups[name].weights]
            if not weights:
                continue
            results = self.results.setdefault(format.name, KnownResults())
            steps = [(spec, graph_pass, results) for spec, graph_pass in format.passes_for(weights)]
            exact = list(takewhile(lambda step: step[1].exact, steps))
            first += exact
            rest += steps[len(exact) :]
        for spec, graph_pass, results in (*first, *rest):
            self.work.apply(spec, graph_pass, results)
            specs.append(spec)
        return specs


def _first_prediction(work: Work, gates: Gates, program: Program) -> Prediction:
    """Predict from the float graph, whose every group is known, too."""
    sums = program.totals(Assignment(dict.fromkeys((choice.group for choice in program.choices), FLOAT)))
    found = _counts(work) | {"spent": 0.0}
    if gates.need_benchmark:
        found |= _speed(work)
    prediction = Prediction()
    prediction.learn(sums | {"loss": 0.0}, found)
    return prediction


def _measured(work: Work, quality: Evaluation, gates: Gates) -> dict[str, float]:
    """Measure what the gates are about; and what is `spent`."""
    found = {"loss": quality.loss, "spent": _spent(quality)} | _counts(work)
    return found | (_speed(work) if gates.need_benchmark else {})


def _spent(quality: Evaluation) -> float:
    """Return the loss or the KL, whichever is more, in nats.

    On text that the reference wrote, perplexity is expected to grow by the KL, but a few thousand tokens tell the
    growth far less well: a lucky text must not make room for more.
    """
    return max(math.log1p(max(0.0, quality.loss)), quality.kl or 0.0)


def _counts(work: Work) -> dict[str, float]:
    """Count bytes, and parameters where layers are recognised."""
    parameters = {} if work.structure is None else {"parameters": float(work.structure.parameters)}
    return {"size_bytes": _file_bytes(work)} | parameters


def _file_bytes(work: Work) -> float:
    """Find out how many bytes the artifact's graphs will take as files, by writing them."""
    graphs = {name: load_graph(path) for name, path in work.current.items()}
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        write_graphs(graphs, Path(folder))
        return float(graph_file_bytes(Path(folder)) + LAST_NODES)


def _speed(work: Work) -> dict[str, float]:
    with work.progress.stage("measuring speed and memory"):
        return speed(work.current, work.judging.threads, dict(work.profile.session_options))


def _failure(program: Program, prediction: Prediction, gates: Gates) -> GateFailedError:
    """Make the error that says how near the limits one can come."""
    limits = prediction.limits(gates)
    said = []
    for name in limits:
        rest = {other: limit for other, limit in limits.items() if other != name}
        nearest = program.assign(rest, {name: 1.0})
        if nearest is not None:
            value = program.totals(nearest)[name]
            said.append(prediction.describe(name, value))
    kinds = "formats and cuts" if program.cuts else "formats"
    return GateFailedError(
        f"gate failed: no mix of {kinds} meets the limits; nothing was written",
        hint=f"keeping the others, possible would be: {', '.join(said)}" if said else "the limits exclude each other",
    )


def _further(
    program: Program, prediction: Prediction, gates: Gates, objective: str, assignment: Assignment
) -> list[str]:
    """Say what other limits would give, as far as can be predicted."""
    limits = prediction.limits(gates)
    lever = "loss" if "loss" in limits else next(iter(limits))
    reached = program.totals(assignment)[objective]
    notes = []
    for factor in (0.5, 2.0, 4.0) if lever == "loss" else (0.8, 0.9, 1.25):
        other = best_choice(program, limits | {lever: factor * limits[lever]}, objective)
        if other is None or not reached:
            continue
        sums = program.totals(other)
        if abs(sums[objective] / reached - 1) > 0.005:
            given, gained = (prediction.describe(name, sums[name]) for name in (lever, objective))
            notes.append(f"{given} would give {gained}")
    return [f"predicted: {'; '.join(notes)}"] if notes else []
