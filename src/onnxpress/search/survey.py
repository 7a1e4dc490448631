"""All that is known of a model's parts before anything is decided: losses, bytes, times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from onnxpress.build.work import Work
from onnxpress.errors import UnsupportedModelError
from onnxpress.files.cache import cache_folder
from onnxpress.files.staging import replacing_file
from onnxpress.graph.io import load_graph
from onnxpress.optimizers.recipe import Recipe
from onnxpress.search import kernels
from onnxpress.search.assignment import Assignment, Choice, CutChoice, Program
from onnxpress.search.cuts import Cut, Site, check_cuts, find_sites, linked
from onnxpress.search.formats import FLOAT, Format
from onnxpress.search.heads import AttentionOutput, find_attention_outputs, without_heads
from onnxpress.search.judging import samples_for
from onnxpress.search.sensitivity import Measurement, measure
from onnxpress.search.units import Unit, find_units

WHOLE = FLOAT
"""The name of leaving a block as it is."""


@dataclass(frozen=True)
class Survey:
    """See the module."""

    units: Sequence[Unit]
    rows: Sequence[Measurement]
    """Of units."""
    table: kernels.KernelTable
    formats: Sequence[Format]
    sites: Sequence[Site] = ()
    cuts: Sequence[Cut] = ()
    cut_rows: Sequence[Measurement] = ()
    """Of blocks."""
    cut_units: Mapping[str, Mapping[str, Unit]] = field(default_factory=dict)
    """By a cut of a block, as `cut_name` calls it, the units that it changes, by name, as it leaves them."""
    attentions: Sequence[AttentionOutput] = ()
    head_rows: Sequence[Measurement] = ()
    """Of attentions without one head."""

    def program(self, importance: Mapping[str, float], tokens: int) -> Program:
        """Every unit in every format, whole and after every cut, with what it costs: loss in nats (or 1 − cosine),
        bytes, parameters, microseconds."""
        found = []
        for row in self.rows:
            found += self._choices(row, None, importance, tokens)
            for cut, units in self.cut_units.items():
                if row.unit in units:
                    found += self._choices(row, cut, importance, tokens)
        cuts = []
        for row in self.cut_rows:
            units = self.cut_units.get(cut_name(row.unit, row.format), {})
            weights = [weight for unit in units.values() for weight in unit.weights]
            if units:
                costs = {"cut_loss": _factor(importance, weights) * row.loss}
                cuts.append(CutChoice(cut_name(row.unit, row.format), costs))
        return Program(found, cuts, self._removals())

    def _removals(self) -> list[tuple[list[str], int]]:
        """The cuts that remove blocks, by stack: one block of each must stay."""
        stacks: dict[str, list[str]] = {}
        for cut in self.cuts:
            for site in self.sites if cut.removes else ():
                if cut_name(site.name, cut.name) in self.cut_units:
                    stacks.setdefault(site.stack, []).append(cut_name(site.name, cut.name))
        depths = Counter(site.stack for site in self.sites)
        return [(names, depths[stack] - 1) for stack, names in stacks.items()]

    def _choices(self, row: Measurement, cut: str | None, importance: Mapping[str, float], tokens: int) -> list[Choice]:
        """A unit in a format, whole or after a cut; none where the given table does not know its kernel."""
        unit = next(unit for unit in self.units if unit.name == row.unit)
        rest = unit if cut is None else self.cut_units[cut][row.unit]
        format = next((one for one in self.formats if one.name == row.format), None)
        times = [self.table.get(rest, format, count) for count in (tokens, kernels.TOKENS[-1])]
        if format is not None and (None in times or not rest.parameters):
            return []  # of what is gone, one format is as good as another
        costs = {
            "loss": _factor(importance, unit.weights) * row.loss,
            "size": row.nbytes * rest.parameters / unit.parameters,
            "parameters": float(rest.parameters),
        }
        costs |= {name: time or 0.0 for name, time in zip(("latency", "prompt"), times, strict=True)}
        return [Choice(row.unit, row.format, costs, cut)]

    def count(self, assignment: Assignment) -> dict[str, int]:
        """How often each format and each cut was chosen."""
        counts = Counter[str](assignment.formats.values() if self.formats else ())
        for cut in self.cuts:
            counts[cut.name] += sum(cut_name(site.name, cut.name) in assignment.cuts for site in self.sites)
        return {name: count for name, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the measurements, with microseconds by number of tokens."""
        units = {unit.name: unit for unit in self.units}
        formats = {one.name: one for one in self.formats}
        rows = []
        for row in self.rows:
            times = {n: self.table.get(units[row.unit], formats.get(row.format), n) for n in kernels.TOKENS}
            rows.append({**_plain(row), "microseconds": {str(n): time for n, time in times.items()}})
        found: dict[str, Any] = {"machine": self.table.machine, "formats": list(formats), "units": rows}
        if self.cuts:
            blocks = [
                {**_plain(row), "parameters_removed": self.removed(row), "left": dict(row.left)}
                for row in self.cut_rows
            ]
            found |= {"cuts": [one.name for one in self.cuts], "blocks": blocks}
        if self.attentions:
            found["heads"] = [
                {"unit": one.name, "losses": [row.loss for row in self.rows_of_heads(one)]} for one in self.attentions
            ]
        return found

    def rows_of_heads(self, attention: AttentionOutput) -> list[Measurement]:
        """By head."""
        return [row for row in self.head_rows if row.unit == attention.name]

    def removed(self, row: Measurement) -> int:
        """How many parameters a cut of a block takes away."""
        left = self.cut_units.get(cut_name(row.unit, row.format), {})
        return sum(unit.parameters - left[unit.name].parameters for unit in self.units if unit.name in left)


def cut_name(site: str, cut: str) -> str:
    return f"{site}: {cut}"


def survey(
    work: Work,
    recipe: Recipe,
    kernel_table: kernels.KernelTable | None = None,
    *,
    every: bool = False,
    heads: bool = False,
) -> Survey:
    """Measure what a recipe's formats and cuts do to the graphs as they are, and how long they take.

    heads: what it does to take single heads out, too.

    Of an encoder-decoder, the two decoders share their weights: the first stands for both.
    """
    cuts = check_cuts(recipe.cuts)
    with work.progress.stage("sampling inputs"):
        samples = samples_for(work, recipe)
    formats, options = _formats(recipe), dict(work.profile.session_options)
    units: dict[str, Unit] = {}
    sites: dict[str, Site] = {}
    attentions: dict[str, AttentionOutput] = {}
    rows: list[Measurement] = []
    for_heads: list[Measurement] = []
    for stem, path in work.current.items():
        model = load_graph(path)
        found = [unit for unit in find_units(model.graph) if unit.name not in units]
        blocks = [site for site in find_sites(model) if site.name not in sites] if cuts else []
        if not found or not samples.get(stem):
            continue
        common = partial(
            measure,
            model,
            samples=samples[stem],
            session_options=options,
            folder=cache_folder() / "sensitivity",
            threads=work.threads,
        )
        with work.progress.stage("measuring what each part loses in each format") as update:
            rows += common(found, formats, sites=blocks, cuts=cuts, every=every, progress=update)
        if heads:
            outputs = [one for one in find_attention_outputs(model) if one.name not in attentions]
            with work.progress.stage("measuring what is lost without each head") as update:
                for_heads += common([], [], sites=outputs, cuts=without_heads(outputs), progress=update)
            attentions |= {one.name: one for one in outputs}
        units |= {unit.name: unit for unit in found}
        sites |= {site.name: site for site in blocks}
    if not rows:
        raise UnsupportedModelError("nothing to choose formats for: the model has no product with constant weights")
    of_blocks = [row for row in rows if row.unit in sites and row.format != WHOLE]
    left = linked({cut_name(row.unit, row.format): row.left for row in of_blocks}, units.values())
    if cuts and not left:
        raise UnsupportedModelError(
            f"none of the cuts {', '.join(cut.name for cut in cuts)} fits any block",
            hint="try one as a pass to see why: onnxpress optimize MODEL -o OUT --pass …",
        )
    return Survey(
        list(units.values()),
        [row for row in rows if row.unit not in sites],
        kernel_table or time_kernels(work, recipe, [unit for cut in left.values() for unit in cut.values()]),
        formats,
        list(sites.values()),
        cuts,
        of_blocks,
        left,
        list(attentions.values()),
        [row for row in for_heads if row.format != FLOAT],
    )


def time_kernels(work: Work, recipe: Recipe, more: Sequence[Unit] = ()) -> kernels.KernelTable:
    """This machine's table with all that a recipe's formats need for the graphs as they are, and for more units; it is
    kept."""
    units = {unit.name: unit for path in work.current.values() for unit in find_units(load_graph(path).graph)}
    wanted = [*units.values(), *(unit for unit in more if unit.parameters)]
    table, path = kernels.host_table(cache_folder() / "kernels", work.threads)
    options = dict(work.profile.session_options)
    with work.progress.stage("timing kernels") as update:
        if kernels.complete(table, wanted, _formats(recipe), options, work.threads, update):
            with replacing_file(path) as aside:
                aside.write_text(table.to_json(), encoding="utf-8")
    return table


def _formats(recipe: Recipe) -> list[Format]:
    return [Format(name, specs) for name, specs in recipe.formats.items()]


def _factor(importance: Mapping[str, float], weights: Sequence[str]) -> float:
    """How much a loss of these weights counts: what the first pattern says that fits one of them."""
    fits = (value for pattern, value in importance.items() if any(fnmatchcase(w, pattern) for w in weights))
    return next(fits, 1.0)


def _plain(row: Measurement) -> dict[str, Any]:
    return {key: value for key, value in asdict(row).items() if key != "left"}
