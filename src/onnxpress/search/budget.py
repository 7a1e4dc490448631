"""Limits in, the best mix of formats out: predicted, built, measured, and mended where the prediction was off."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

from onnxpress import artifact_folder
from onnxpress.artifact import Step
from onnxpress.errors import GateFailedError
from onnxpress.evaluation import Evaluation
from onnxpress.gates import Gates
from onnxpress.graph_io import load_graph
from onnxpress.measuring import speed
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.calibration import Calibration
from onnxpress.optimizers.fit_blocks import Fitted
from onnxpress.optimizers.quantize_blocks import QuantizeBlocks
from onnxpress.optimizers.recipe import PassSpec, Recipe
from onnxpress.search import kernels
from onnxpress.search.assignment import Choice, assign, totals
from onnxpress.search.formats import FLOAT
from onnxpress.search.options import SearchOptions
from onnxpress.search.prediction import Prediction
from onnxpress.search.survey import Survey, survey
from onnxpress.work import Mark, Work, discard

ROUNDS = 4
"""Assignments that are built and measured, at most."""
CLOSE = 0.85
"""A loss that uses this much of what is allowed is close enough."""
LAST_NODES = 2048
"""Bytes of the nodes that are added when logits are cut to the last position."""
TIES = 0.02
"""What all other costs together weigh beside the one to minimise."""


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    recipe: Recipe
    """With a pass for each format that was chosen, by names of weights: it builds the same again without a search."""
    quality: Evaluation
    notes: list[str] = field(default_factory=list)


def search(work: Work, recipe: Recipe, gates: Gates, options: SearchOptions) -> Found:
    """Choose formats so that the gates hold, build and measure; the work is left with the best that was found.

    What has no limit is made as good as it gets, see `SearchOptions.minimize`.

    Raises GateFailedError, with what would be possible, where no assignment meets the limits.
    """
    began = time.perf_counter()
    known = survey(work, recipe, options.kernel_table)
    decoder = work.artifact.task.startswith("text-generation")
    choices = known.choices(recipe.importance, kernels.TOKENS[0] if decoder else kernels.TOKENS[-1])
    prediction, objective = _first_prediction(work, gates, choices), options.objective(gates)
    builder = _Builder(work, known, recipe)
    best: tuple[float, Mark, dict[str, str], Evaluation, Recipe] | None = None
    tried: list[dict[str, str]] = []
    with contextlib.closing(builder):
        while len(tried) < ROUNDS:
            assignment = assign(choices, prediction.limits(gates), _weights(choices, objective))
            if assignment is None or assignment in tried:
                break
            tried.append(assignment)
            chosen = builder.build(assignment)
            quality, sums = work.evaluate(), totals(choices, assignment)
            found = _measured(work, quality, gates)
            prediction.learn(sums, found)
            if all(gate.passed for gate in gates.check(found)):
                score = found["spent"] if objective == "loss" else sums[objective]
                if best is None or score < best[0]:
                    best = (score, work.mark(), assignment, quality, chosen)
                if (
                    gates.max_loss is None
                    or found["spent"] >= CLOSE * math.log1p(gates.max_loss)
                    or objective == "loss"
                ):
                    break
    if best is None:
        raise _failure(choices, prediction, gates)
    _, state, assignment, quality, chosen = best
    work.restore(state)
    limits = {name: value for name, value in vars(gates).items() if value is not None}
    work.record(Step("search", limits, time.perf_counter() - began, dict(Counter(assignment.values()))))
    return Found(chosen, quality, _further(choices, prediction, gates, objective, assignment))


@dataclass
class _Builder:
    """Puts assignments into graphs, always from the same start."""

    work: Work
    known: Survey
    recipe: Recipe

    def __post_init__(self) -> None:
        self.start = self.work.mark()
        self.fitted: dict[str, dict[str, Fitted]] = {}
        """By format: what was fitted in a round before need not be fitted again."""
        self.kept: list[Calibration] = []

    def close(self) -> None:
        discard(self.kept)

    def build(self, assignment: Mapping[str, str]) -> Recipe:
        """Run each format's pass on the weights that it was chosen for, and those after; return this as a recipe."""
        self.work.restore(self.start)
        units = {unit.name: unit for unit in self.known.units}
        specs: list[PassSpec] = []
        first: list[tuple[PassSpec, Pass]] = []
        """What formats begin with and is exact: on a graph that nothing was rounded in, verification can tell."""
        rest: list[tuple[PassSpec, Pass]] = []
        for format in self.known.formats:
            weights = [w for name, chosen in assignment.items() if chosen == format.name for w in units[name].weights]
            if not weights:
                continue
            steps = format.passes_for(weights)
            for _, one in steps:
                if isinstance(one, QuantizeBlocks):
                    one.fitted = self.fitted.setdefault(format.name, one.fitted)
            exact = list(takewhile(lambda step: step[1].exact, steps))
            first += exact
            rest += steps[len(exact) :]
        for spec, one in (*first, *rest):
            self.work.apply(spec, one, self.kept)
            specs.append(spec)
        after = self.recipe.after
        for spec in after:
            self.work.apply(spec, spec.build())
        passes = (*self.recipe.passes, *specs, *after)
        return replace(self.recipe, passes=passes, formats={}, importance={}, after=())


def _first_prediction(work: Work, gates: Gates, choices: Sequence[Choice]) -> Prediction:
    """From the float graph, whose every unit is known, too."""
    sums = totals(choices, dict.fromkeys({choice.unit for choice in choices}, FLOAT))
    found = {"size_bytes": _file_bytes(work), "spent": 0.0}
    if gates.need_benchmark:
        found |= _speed(work)
    prediction = Prediction()
    prediction.learn(sums | {"loss": 0.0}, found)
    return prediction


def _weights(choices: Sequence[Choice], objective: str) -> dict[str, float]:
    """The objective, and a little of everything else, each as a share of the most that it could be."""
    most: dict[str, float] = {}
    for name in choices[0].costs:
        by_unit: dict[str, float] = {}
        for choice in choices:
            by_unit[choice.unit] = max(by_unit.get(choice.unit, 0.0), choice.costs[name])
        most[name] = sum(by_unit.values()) or 1.0
    return {name: (1.0 if name == objective else TIES / 3) / total for name, total in most.items()}


def _measured(work: Work, quality: Evaluation, gates: Gates) -> dict[str, float]:
    """What the gates are about; and as `spent`, in nats, the loss or the KL, whichever is more.

    On text that the reference wrote, perplexity is expected to grow by the KL, but a few thousand tokens tell the
    growth far less well: a lucky text must not make room for more.
    """
    found = {"loss": quality.loss, "spent": max(math.log1p(max(0.0, quality.loss)), quality.kl or 0.0)}
    found["size_bytes"] = _file_bytes(work)
    return found | (_speed(work) if gates.need_benchmark else {})


def _file_bytes(work: Work) -> float:
    """What the artifact's graphs will take as files, by writing them."""
    graphs = {stem: load_graph(path) for stem, path in work.current.items()}
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        artifact_folder.write_graphs(graphs, Path(folder))
        return float(artifact_folder.size_bytes(Path(folder)) + LAST_NODES)


def _speed(work: Work) -> dict[str, float]:
    with work.progress.stage("measuring speed and memory"):
        return speed(work.current, work.threads, dict(work.profile.session_options))


def _failure(choices: Sequence[Choice], prediction: Prediction, gates: Gates) -> GateFailedError:
    """It says how near the limits one can come."""
    limits = prediction.limits(gates)
    said = []
    for name in limits:
        rest = {other: limit for other, limit in limits.items() if other != name}
        nearest = assign(choices, rest, _weights(choices, name))
        if nearest is not None:
            value = totals(choices, nearest)[name]
            said.append(prediction.describe(name, value))
    return GateFailedError(
        "gate failed: no mix of formats meets the limits; nothing was written",
        hint=f"keeping the others, possible would be: {', '.join(said)}" if said else "the limits exclude each other",
    )


def _further(
    choices: Sequence[Choice], prediction: Prediction, gates: Gates, objective: str, assignment: Mapping[str, str]
) -> list[str]:
    """What other limits would give, as far as can be predicted."""
    limits = prediction.limits(gates)
    lever = "loss" if "loss" in limits else next(iter(limits))
    reached = totals(choices, assignment)[objective]
    notes = []
    for factor in (0.5, 2.0, 4.0) if lever == "loss" else (0.8, 0.9, 1.25):
        other = assign(choices, limits | {lever: factor * limits[lever]}, _weights(choices, objective))
        if other is None:
            continue
        sums = totals(choices, other)
        if abs(sums[objective] / reached - 1) > 0.005:
            given, gained = (prediction.describe(name, sums[name]) for name in (lever, objective))
            notes.append(f"{given} would give {gained}")
    return [f"predicted: {'; '.join(notes)}"] if notes else []
