"""Print on stdout what commands report: tables with rich, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from onnxpress.building.gates import costs
from onnxpress.report.figures import amount, before_after, label
from onnxpress.report.listing import signature

if TYPE_CHECKING:
    from onnxpress.artifact.structure import StructureChange
    from onnxpress.pipeline import BuildResult
    from onnxpress.report.drawing import Bar
    from onnxpress.report.inspection import Port
    from onnxpress.report.overview import Overview
    from onnxpress.search.sensitivity import Measurement
    from onnxpress.search.sensitivity_profile import SensitivityProfile

_WIDTH = 110
_CACHE = ("past_key_values.", "present")


def print_json(value: Any) -> None:
    """Print one JSON document; what is not a number (an infinite perplexity) becomes null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def print_build(result: BuildResult) -> None:
    """Print the steps, the before/after table, the gates, and where the artifact is."""
    from onnxpress.artifact.structure import StructureChange
    from onnxpress.artifact.structure_changes import list_changes

    console = _console()
    record = result.manifest
    structure = StructureChange.of(record.export)
    measures = ("size_bytes", "perplexity", "cosine_mean", "kl", "max_difference")
    shown = [key for key in measures if any(key in step.metrics for step in record.steps)]
    titles = {"size_bytes": "size", "cosine_mean": "cosine", "kl": "KL", "max_difference": "largest difference"}
    steps = _table("step", "seconds", *(titles.get(key, key) for key in shown), "changed", "left alone")
    for step in record.steps:
        skipped = ", ".join(f"{reason} ({count})" for reason, count in step.skipped.items())
        figures = (amount(key, step.metrics.get(key)) for key in shown)
        steps.add_row(step.name, f"{step.seconds:.1f}", *figures, _counts(step.matched), skipped)
    console.print(steps)
    rows = before_after(record.before, record.metrics)
    if rows:
        table = _table(f"{record.name}, {record.profile}", "before (fp32)", "after")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    if structure is not None:
        table = _table("what was cut", "before", "after")
        for row in list_changes(structure.before, structure.after):
            table.add_row(*map(escape, row))
        console.print(table)
    spent = costs(record.before, result.steps)
    if spent:
        console.print("[bold]cost by pass[/]  " + escape(" · ".join(spent)))
    for gate in record.gates:
        console.print(f"[bold]gate[/]  {gate.name}: {gate.value:g} of {gate.limit:g}")
    for note in result.notes:
        console.print(f"[yellow]note[/]  {escape(note)}")
    console.print(f"[bold]artifact[/]  {escape(str(result.path))}")


def print_metrics(title: str, metrics: Mapping[str, Any]) -> None:
    """Print a table of figures, each with its unit."""
    table = _table(title, "")
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(label(key), amount(key, float(value)))
        elif not isinstance(value, (dict, list)):
            table.add_row(label(key), escape(str(value)))
    _console().print(table)


def print_benchmark(title: str, measured: Mapping[str, Any]) -> None:
    """Print numbers first, then the operator profile where there is one."""
    print_metrics(title, measured)
    for name, rows in measured.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            _console().print(f"[bold]{escape(label(name))}[/]")
            print_rows(rows)
        elif isinstance(rows, dict) and rows:
            print_metrics(label(name), rows)


def print_overview(overview: Overview) -> None:
    """Print each graph's parameters, memory, operators, inputs and outputs; weights by layer and format; warnings."""
    from onnxpress.report.overview import CONTEXTS

    console = _console()
    for name, graph in overview.graphs.items():
        head = _table(name, "")
        head.add_row("parameters", f"{graph.total.parameters:,}")
        head.add_row("weights", _megabytes(graph.total.bytes))
        if graph.kv_cache_bytes_per_token:
            head.add_row("cache", f"{graph.kv_cache_bytes_per_token:,} bytes per token")
            memory = (f"{_megabytes(graph.memory(size).total)} at {size:,}" for size in CONTEXTS)
            head.add_row("memory by context", ", ".join(memory))
        head.add_row("opset", ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in graph.opsets.items()))
        head.add_row("inputs", escape("\n".join(_ports(graph.inputs))))
        head.add_row("outputs", escape("\n".join(_ports(graph.outputs))))
        head.add_row("nodes", f"{sum(graph.operators.values())}: {_counts(graph.operators)}")
        console.print(head)
        layers = _table("weights of", "parameters", "bytes", "formats")
        for layer in graph.layers:
            formats = ", ".join(f"{form} {_megabytes(size.bytes)}" for form, size in layer.formats.items())
            layers.add_row(layer.name, f"{layer.total.parameters:,}", f"{layer.total.bytes:,}", formats)
        console.print(layers)
    if overview.structure is not None:
        print_structure(overview.structure)
    for warning in overview.warnings:
        console.print(f"[yellow]warning[/]  {escape(warning)}")


def print_structure(record: StructureChange) -> None:
    """Print a row for each layer of the model before, with bars of what is left of it and of what was cut."""
    from onnxpress.report.drawing import draw_structure

    console, drawing = _console(), draw_structure(record)
    totals = _table("what was cut", "before → after")
    for title, bar in drawing.totals.items():
        change = f" ({bar.after / bar.before - 1:+.1%})" if bar.before and bar.after != bar.before else ""
        totals.add_row(escape(title), f"{bar}{change}")
    console.print(totals)
    for stack in drawing.stacks:
        layers = _table(stack.name, *(f"{title}\n{stack.summary(title)}" for title in stack.sizes))
        for layer in stack.layers:
            cells = [
                _bar(layer.bars[title], most) if title in layer.bars else "" for title, most in stack.sizes.items()
            ]
            layers.add_row(f"{layer.index} {layer.fate}".strip(), *cells)
        console.print(layers)
    for reason in drawing.onnx_only:
        console.print(f"[yellow]ONNX only[/]  {escape(reason)}")


def _bar(bar: Bar, most: int) -> str:
    left, cut = bar.cells(most)
    return f"[cyan]{'█' * left}[/][dim]{'░' * cut}[/] {f'{bar.after:,}' if bar.after else ''}".strip()


def print_sensitivity(profile: SensitivityProfile) -> None:
    """Print a row for each group of products, a column for each format: what the model loses.

    And a row for each block, a column for each cut: what the model loses, and how much of the block is gone. And a row
    for each attention, with the order of its heads.
    """
    console = _console()
    if profile.formats:
        names = [one.name for one in profile.formats]
        rows = {(row.part, row.format): row for row in profile.rows}
        table = _table("loss with only this in", "float32", *names)
        for group in profile.groups:
            losses = (_loss(rows.get((group.name, name))) for name in names)
            table.add_row(escape(group.name), _megabytes(group.parameters * 4), *losses)
        console.print(table)
        console.print(
            "[dim]~ inferred from the error of the part and a loss that was measured (--every measures all)[/]"
        )
    if profile.cuts:
        names = [one.name for one in profile.cuts]
        rows = {(row.part, row.format): row for row in profile.cut_rows}
        table = _table("loss with only this cut", "parameters", *names)
        for candidate in profile.candidates:
            cells = []
            for name in names:
                row = rows.get((candidate.name, name))
                cells.append(
                    _loss(row) + (f" [dim]−{profile.removed(row) / candidate.parameters:.0%}[/]" if row else "")
                )
            table.add_row(escape(candidate.name), f"{candidate.parameters:,}", *cells)
        console.print(table)
    if profile.attentions:
        table = _table("loss without one head", "least", "most", "heads, from the least loss to the most")
        for attention in profile.attentions:
            ranked = sorted((row.loss, head) for head, row in enumerate(profile.rows_of_heads(attention)))
            ends = (f"[{_heat(loss)}]{loss:.1e}[/]" for loss, _ in (ranked[0], ranked[-1]))
            order = " ".join(f"[{_heat(loss)}]{head}[/]" for loss, head in ranked)
            table.add_row(escape(attention.name), *ends, order)
        console.print(table)


def _loss(row: Measurement | None) -> str:
    return "–" if row is None else f"[{_heat(row.loss)}]{row.loss:.1e}{'' if row.measured else '~'}[/]"


def _heat(loss: float) -> str:
    """Choose a colour for a loss by its power of ten."""
    return ("blue", "cyan", "green", "yellow", "red")[max(0, min(4, int(math.log10(max(loss, 1e-9)) + 7)))]


def print_run(answer: Mapping[str, Any]) -> None:
    """Add to the text that `run` streamed: speed, or the similarity of texts."""
    if "texts" in answer:
        print_rows([{"text": row["text"], "cosine to the first": row["cosine"]} for row in answer["texts"]])
        return
    print(flush=True)
    speed = f"{answer['pieces']} pieces of text, {answer['pieces_per_s']:.1f} per second with the prompt"
    Console(stderr=True, highlight=False).print(f"[dim]{speed}[/]")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with one column per key of the first row."""
    if not rows:
        _console().print("none")
        return
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*(escape(_cell(row.get(key))) for key in rows[0]))
    _console().print(table)


def print_pass(details: Mapping[str, Any]) -> None:
    """Print what a pass does, then its options, each with its explanation."""
    console = _console()
    console.print(
        f"[bold]{details['name']}[/]  {escape(details['does'])} {'Exact.' if details['exact'] else 'Not exact.'}"
    )
    for option in details["options"]:
        console.print(f"\n[bold]{option['name']}[/]: {escape(signature(option))}")
        console.print(Padding(escape(option["explanation"]), (0, 0, 0, 4)))


def print_details(details: Mapping[str, Any]) -> None:
    """Print the fields of one recipe, profile or model; then a table for each that is a list of tables."""
    table = _table(details["name"], "")
    for key, value in details.items():
        if key != "name" and value not in ({}, []) and not _is_rows(value):
            table.add_row(label(key), escape(_cell(value)))
    _console().print(table)
    for key, value in details.items():
        if _is_rows(value):
            first = next(iter(value[0]))
            rest = [{name: item for name, item in row.items() if name != first} for row in value]
            print_rows([{key: row[first], "options": others} for row, others in zip(value, rest, strict=True)])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _console() -> Console:
    """Make a console: as wide as the terminal; into a pipe of a fixed width, so that no table breaks unseen."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(escape(column), overflow="fold")
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _ports(ports: Sequence[Port]) -> list[str]:
    """Write inputs or outputs as text, the cache's many as one line."""
    text = {port.name: f"{port.dtype}[{', '.join(map(str, port.shape))}]" for port in ports}
    cache = [kind for name, kind in text.items() if name.startswith(_CACHE)]
    plain = [f"{name}: {kind}" for name, kind in text.items() if not name.startswith(_CACHE)]
    return [*plain, *([f"cache: {len(cache)} times {cache[0]}"] if cache else [])]


def _megabytes(value: int) -> str:
    return f"{value / 1e6:,.1f} MB"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
