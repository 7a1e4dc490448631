"""All that is known of a model's units before anything is decided: losses, bytes, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from onnxpress.errors import UnsupportedModelError
from onnxpress.exporter.cache import cache_folder
from onnxpress.graph_io import load_graph
from onnxpress.optimizers.recipe import Recipe
from onnxpress.search import kernels
from onnxpress.search.assignment import Choice
from onnxpress.search.formats import Format
from onnxpress.search.judging import samples_for
from onnxpress.search.sensitivity import Measurement, measure
from onnxpress.search.units import Unit, find_units
from onnxpress.staging import replacing_file
from onnxpress.work import Work


@dataclass(frozen=True)
class Survey:
    """See the module."""

    units: Sequence[Unit]
    rows: Sequence[Measurement]
    table: kernels.KernelTable
    formats: Sequence[Format]

    def choices(self, importance: Mapping[str, float], tokens: int) -> list[Choice]:
        """Every unit in every format, with what it costs: loss in nats (or 1 − cosine), bytes, microseconds."""
        units = {unit.name: unit for unit in self.units}
        formats = {one.name: one for one in self.formats}
        found = []
        for row in self.rows:
            unit, format = units[row.unit], formats.get(row.format)
            times = [self.table.get(unit, format, count) for count in (tokens, kernels.TOKENS[-1])]
            if None in times and format is not None:
                continue  # the given table does not know this kernel: it cannot be chosen
            factor = next(
                (value for pattern, value in importance.items() if any(fnmatchcase(w, pattern) for w in unit.weights)),
                1.0,
            )
            costs = {"loss": factor * row.loss, "size": float(row.nbytes)}
            costs |= {name: time or 0.0 for name, time in zip(("latency", "prompt"), times, strict=True)}
            found.append(Choice(row.unit, row.format, costs))
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the measurements, with microseconds by number of tokens."""
        units = {unit.name: unit for unit in self.units}
        formats = {one.name: one for one in self.formats}
        rows = []
        for row in self.rows:
            times = {n: self.table.get(units[row.unit], formats.get(row.format), n) for n in kernels.TOKENS}
            rows.append({**asdict(row), "microseconds": {str(n): time for n, time in times.items()}})
        return {"machine": self.table.machine, "formats": list(formats), "units": rows}


def survey(work: Work, recipe: Recipe, kernel_table: kernels.KernelTable | None = None, every: bool = False) -> Survey:
    """Measure what a recipe's formats do to the graphs as they are, and how long they take.

    Of an encoder-decoder, the two decoders share their weights: the first stands for both.
    """
    with work.progress.stage("sampling inputs"):
        samples = samples_for(work, recipe)
    formats, options = _formats(recipe), dict(work.profile.session_options)
    units: dict[str, Unit] = {}
    rows: list[Measurement] = []
    for stem, path in work.current.items():
        model = load_graph(path)
        found = [unit for unit in find_units(model.graph) if unit.name not in units]
        if not found or not samples.get(stem):
            continue
        with work.progress.stage("measuring what each product loses in each format") as update:
            measured = measure(
                model,
                found,
                formats,
                samples[stem],
                session_options=options,
                every=every,
                folder=cache_folder() / "sensitivity",
                threads=work.threads,
                progress=update,
            )
        units |= {unit.name: unit for unit in found}
        rows += measured
    if not rows:
        raise UnsupportedModelError("nothing to choose formats for: the model has no product with constant weights")
    return Survey(list(units.values()), rows, kernel_table or time_kernels(work, recipe), formats)


def time_kernels(work: Work, recipe: Recipe) -> kernels.KernelTable:
    """This machine's table with all that a recipe's formats need for the graphs as they are; it is kept."""
    units = {unit.name: unit for path in work.current.values() for unit in find_units(load_graph(path).graph)}
    table, path = kernels.host_table(cache_folder() / "kernels", work.threads)
    options = dict(work.profile.session_options)
    with work.progress.stage("timing kernels") as update:
        if kernels.complete(table, list(units.values()), _formats(recipe), options, work.threads, update):
            with replacing_file(path) as aside:
                aside.write_text(table.to_json(), encoding="utf-8")
    return table


def _formats(recipe: Recipe) -> list[Format]:
    return [Format(name, specs) for name, specs in recipe.formats.items()]
