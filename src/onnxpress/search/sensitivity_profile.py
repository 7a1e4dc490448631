"""The sensitivity profile of a model: losses, bytes and times of all its parts, before anything is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from onnxpress.building.work import Work
from onnxpress.errors import UnsupportedModelError
from onnxpress.files.cache import cache_folder
from onnxpress.files.staging import replacing_file
from onnxpress.graph.io import load_graph
from onnxpress.optimizers.recipe import Recipe
from onnxpress.search import kernels
from onnxpress.search.assignment import Assignment, Choice, CutChoice, Program
from onnxpress.search.block_cuts import Cut, CutCandidate, check_cuts, find_candidates, linked
from onnxpress.search.formats import FLOAT, Format
from onnxpress.search.groups import Group, find_groups
from onnxpress.search.head_removal import AttentionOutput, find_attention_outputs, without_heads
from onnxpress.search.sensitivity import Measurement, measure_parts
from onnxpress.search.trial_inputs import sample_inputs

WHOLE = FLOAT
"""The name of leaving a block as it is."""


@dataclass(frozen=True)
class SensitivityProfile:
    """Losses of groups of products in formats, of blocks after cuts, and of attentions without single heads."""

    groups: Sequence[Group]
    rows: Sequence[Measurement]
    """Measurements of groups."""
    table: kernels.KernelTable
    formats: Sequence[Format]
    candidates: Sequence[CutCandidate] = ()
    cuts: Sequence[Cut] = ()
    cut_rows: Sequence[Measurement] = ()
    """Measurements of blocks."""
    cut_groups: Mapping[str, Mapping[str, Group]] = field(default_factory=dict)
    """By a cut of a block, as `cut_name` calls it, the groups that it changes, by name, as it leaves them."""
    attentions: Sequence[AttentionOutput] = ()
    head_rows: Sequence[Measurement] = ()
    """Measurements of attentions without one head."""

    def program(self, importance: Mapping[str, float], tokens: int) -> Program:
        """List every group in every format, whole and after every cut, with its costs: loss in nats (or 1 − cosine),
        bytes, parameters, microseconds."""
        choices = []
        for row in self.rows:
            choices += self._choices(row, None, importance, tokens)
            for cut, groups in self.cut_groups.items():
                if row.part in groups:
                    choices += self._choices(row, cut, importance, tokens)
        cuts = []
        for row in self.cut_rows:
            groups = self.cut_groups.get(cut_name(row.part, row.format), {})
            weights = [weight for group in groups.values() for weight in group.weights]
            if groups:
                costs = {"cut_loss": _factor(importance, weights) * row.loss}
                cuts.append(CutChoice(cut_name(row.part, row.format), costs))
        return Program(choices, cuts, self._removals())

    def _removals(self) -> list[tuple[list[str], int]]:
        """List the cuts that remove blocks, by stack: one block of each must stay."""
        stacks: dict[str, list[str]] = {}
        for cut in self.cuts:
            for candidate in self.candidates if cut.removes else ():
                if cut_name(candidate.name, cut.name) in self.cut_groups:
                    stacks.setdefault(candidate.stack, []).append(cut_name(candidate.name, cut.name))
        depths = Counter(candidate.stack for candidate in self.candidates)
        return [(names, depths[stack] - 1) for stack, names in stacks.items()]

    def _choices(self, row: Measurement, cut: str | None, importance: Mapping[str, float], tokens: int) -> list[Choice]:
        """Make the choice of a group in a format, whole or after a cut; none where the table lacks its kernel."""
        group = next(group for group in self.groups if group.name == row.part)
        rest = group if cut is None else self.cut_groups[cut][row.part]
        format = next((one for one in self.formats if one.name == row.format), None)
        times = [self.table.get(rest, format, count) for count in (tokens, kernels.TOKENS[-1])]
        if format is not None and (None in times or not rest.parameters):
            return []  # of what is gone, one format is as good as another
        costs = {
            "loss": _factor(importance, group.weights) * row.loss,
            "size": row.nbytes * rest.parameters / group.parameters,
            "parameters": float(rest.parameters),
        }
        costs |= {name: time or 0.0 for name, time in zip(("latency", "prompt"), times, strict=True)}
        return [Choice(row.part, row.format, costs, cut)]

    def count(self, assignment: Assignment) -> dict[str, int]:
        """Count how often each format and each cut was chosen."""
        counts = Counter[str](assignment.formats.values() if self.formats else ())
        for cut in self.cuts:
            counts[cut.name] += sum(
                cut_name(candidate.name, cut.name) in assignment.cuts for candidate in self.candidates
            )
        return {name: count for name, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the measurements, with microseconds by number of tokens."""
        groups = {group.name: group for group in self.groups}
        formats = {one.name: one for one in self.formats}
        rows = []
        for row in self.rows:
            times = {n: self.table.get(groups[row.part], formats.get(row.format), n) for n in kernels.TOKENS}
            rows.append({**_plain(row), "microseconds": {str(n): time for n, time in times.items()}})
        content: dict[str, Any] = {"machine": self.table.machine, "formats": list(formats), "units": rows}
        if self.cuts:
            blocks = [
                {**_plain(row), "parameters_removed": self.removed(row), "left": dict(row.left)}
                for row in self.cut_rows
            ]
            content |= {"cuts": [one.name for one in self.cuts], "blocks": blocks}
        if self.attentions:
            content["heads"] = [
                {"unit": one.name, "losses": [row.loss for row in self.rows_of_heads(one)]} for one in self.attentions
            ]
        return content

    def rows_of_heads(self, attention: AttentionOutput) -> list[Measurement]:
        """Select the measurements of an attention, by head."""
        return [row for row in self.head_rows if row.part == attention.name]

    def removed(self, row: Measurement) -> int:
        """Count the parameters that a cut of a block takes away."""
        left = self.cut_groups.get(cut_name(row.part, row.format), {})
        return sum(group.parameters - left[group.name].parameters for group in self.groups if group.name in left)


def cut_name(block: str, cut: str) -> str:
    """Name a cut of a block."""
    return f"{block}: {cut}"


def measure_profile(
    work: Work,
    recipe: Recipe,
    kernel_table: str | Path | None = None,
    *,
    every: bool = False,
    heads: bool = False,
) -> SensitivityProfile:
    """Measure what a recipe's formats and cuts do to the graphs as they are, and how long they take.

    Args:
        kernel_table: a file, see `kernels.read_kernel_table`; None: this machine is timed.
        every: measure every loss, see `measure_parts`.
        heads: measure what it does to take single heads out, too.

    Of an encoder-decoder, the two decoders share their weights: the first stands for both.
    """
    cuts = check_cuts(recipe.cuts)
    with work.progress.stage("sampling inputs"):
        samples = sample_inputs(work, recipe)
    formats, options = _formats(recipe), dict(work.profile.session_options)
    groups: dict[str, Group] = {}
    candidates: dict[str, CutCandidate] = {}
    attentions: dict[str, AttentionOutput] = {}
    rows: list[Measurement] = []
    for_heads: list[Measurement] = []
    for name, path in work.current.items():
        model = load_graph(path)
        new_groups = [group for group in find_groups(model.graph) if group.name not in groups]
        blocks = [candidate for candidate in find_candidates(model) if candidate.name not in candidates] if cuts else []
        if not new_groups or not samples.get(name):
            continue
        common = partial(
            measure_parts,
            model,
            samples=samples[name],
            session_options=options,
            folder=cache_folder() / "sensitivity",
            threads=work.judging.threads,
        )
        with work.progress.stage("measuring what each part loses in each format") as update:
            rows += common(new_groups, formats, others=blocks, cuts=cuts, every=every, progress=update)
        if heads:
            outputs = [one for one in find_attention_outputs(model) if one.name not in attentions]
            with work.progress.stage("measuring what is lost without each head") as update:
                for_heads += common([], [], others=outputs, cuts=without_heads(outputs), progress=update)
            attentions |= {one.name: one for one in outputs}
        groups |= {group.name: group for group in new_groups}
        candidates |= {candidate.name: candidate for candidate in blocks}
    if not rows:
        raise UnsupportedModelError("nothing to choose formats for: the model has no product with constant weights")
    of_blocks = [row for row in rows if row.part in candidates and row.format != WHOLE]
    left = linked({cut_name(row.part, row.format): row.left for row in of_blocks}, groups.values())
    if cuts and not left:
        raise UnsupportedModelError(
            f"none of the cuts {', '.join(cut.name for cut in cuts)} fits any block",
            hint="try one as a pass to see why: onnxpress optimize MODEL -o OUT --pass …",
        )
    return SensitivityProfile(
        list(groups.values()),
        [row for row in rows if row.part not in candidates],
        kernels.read_kernel_table(kernel_table)
        if kernel_table
        else time_kernels(work, recipe, [group for cut in left.values() for group in cut.values()]),
        formats,
        list(candidates.values()),
        cuts,
        of_blocks,
        left,
        list(attentions.values()),
        [row for row in for_heads if row.format != FLOAT],
    )


def time_kernels(work: Work, recipe: Recipe, more: Sequence[Group] = ()) -> kernels.KernelTable:
    """Complete this machine's table with all that a recipe's formats need for the graphs as they are, and for more
    groups; it is kept."""
    groups = {group.name: group for path in work.current.values() for group in find_groups(load_graph(path).graph)}
    wanted = [*groups.values(), *(group for group in more if group.parameters)]
    table, path = kernels.host_table(cache_folder() / "kernels", work.judging.threads)
    options = dict(work.profile.session_options)
    with work.progress.stage("timing kernels") as update:
        if kernels.complete(table, wanted, _formats(recipe), options, work.judging.threads, update):
            with replacing_file(path) as aside:
                aside.write_text(table.to_json(), encoding="utf-8")
    return table


def _formats(recipe: Recipe) -> list[Format]:
    return [Format(name, specs) for name, specs in recipe.formats.items()]


def _factor(importance: Mapping[str, float], weights: Sequence[str]) -> float:
    """Return how much a loss of these weights counts: what the first pattern says that fits one of them."""
    fits = (value for pattern, value in importance.items() if any(fnmatchcase(w, pattern) for w in weights))
    return next(fits, 1.0)


def _plain(row: Measurement) -> dict[str, Any]:
    """The JSON of a measurement, whose part is called `unit` there."""
    rest = {key: value for key, value in asdict(row).items() if key not in ("part", "left")}
    return {"unit": row.part, **rest}
