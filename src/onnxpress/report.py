"""What the command line prints on stdout: tables with rich, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxpress.gates import costs, loss

if TYPE_CHECKING:
    from onnxpress.inspection import Inspection
    from onnxpress.pipeline import BuildResult

Row = tuple[str, str, str]

_LABELS = {
    "size_bytes": "size",
    "perplexity": "perplexity",
    "kl": "KL to the reference",
    "top1_agreement": "top-1 agreement",
    "cosine_mean": "cosine, mean",
    "cosine_min": "cosine, worst",
    "spearman": "rank correlation",
    "prefill_tokens_per_s": "prefill",
    "decode_ms_per_token": "decode",
    "latency_ms": "latency",
    "load_s": "load",
    "peak_rss_bytes": "peak memory",
}
_WIDTH = 110


def print_json(value: Any) -> None:
    """One JSON document; what is not a number (an infinite perplexity) becomes null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def before_after(before: Mapping[str, float], after: Mapping[str, float]) -> list[Row]:
    """(measure, before, after) for everything that was measured, in the order of `_LABELS`, the rest after it."""
    keys = [key for key in _LABELS if key in before or key in after]
    keys += sorted(key for key in after if key not in _LABELS and key.startswith(("kl_", "top1_", "perplexity_")))
    rows = []
    for key in keys:
        change = ""
        if key in before and key in after and key in ("size_bytes", "perplexity") and before[key]:
            ratio = after[key] / before[key]
            change = f" ({ratio:.2f}×)" if key == "size_bytes" else f" ({ratio - 1:+.2%})"
        rows.append((label(key), amount(key, before.get(key)), amount(key, after.get(key)) + change))
    return rows


def label(key: str) -> str:
    return _LABELS.get(key, key.replace("_", " "))


def amount(key: str, value: float | None) -> str:
    """A measured value with its unit."""
    if value is None:
        return "–"
    if key.endswith("_bytes"):
        return f"{value / 1e6:.1f} MB"
    if key.startswith("top1"):
        return f"{value:.2%}"
    if key.endswith("tokens_per_s"):
        return f"{value:,.0f} tokens/s"
    if "ms_per_token" in key:
        return f"{value:.2f} ms/token"
    if key.endswith("_ms"):
        return f"{value:.2f} ms"
    if key.endswith("_s"):
        return f"{value:.2f} s"
    if key.startswith(("kl", "max_difference")):
        return f"{value:.2g}"
    if key.startswith(("cosine", "spearman")):
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1e6 else f"{value:.4g}"


def print_build(result: BuildResult) -> None:
    """The steps, the before/after table, the gates, and where the artifact is."""
    console = _console()
    record = result.manifest
    steps = _table("step", "seconds", "changed", "left alone", "KL", "max difference")
    for step in record.steps:
        skipped = ", ".join(f"{reason} ({count})" for reason, count in step.skipped.items())
        steps.add_row(
            step.name,
            f"{step.seconds:.1f}",
            _counts(step.matched),
            skipped,
            amount("kl", step.metrics.get("kl")),
            amount("max_difference", step.metrics.get("max_difference")),
        )
    console.print(steps)
    rows = before_after(record.before, record.metrics)
    if rows:
        table = _table(f"{record.name}, {record.profile}", "before (fp32)", "after")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    spent = costs(record.before, result.steps)
    if spent:
        console.print("[bold]cost by pass[/]  " + escape(" · ".join(spent)))
    total = loss(record.before, record.metrics)
    if total is not None:
        console.print(f"[bold]loss[/]  {total:.2%}")
    for gate in record.gates:
        console.print(f"[bold]gate[/]  {gate.name}: {gate.value:g} of {gate.limit:g}")
    for note in result.notes:
        console.print(f"[yellow]note[/]  {escape(note)}")
    console.print(f"[bold]artifact[/]  {escape(str(result.path))}")


def print_metrics(title: str, metrics: Mapping[str, Any]) -> None:
    table = _table(title, "")
    for key, value in metrics.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            table.add_row(label(key), amount(key, float(value)))
        elif not isinstance(value, (dict, list)):
            table.add_row(label(key), escape(str(value)))
    _console().print(table)


def print_benchmark(title: str, measured: Mapping[str, Any]) -> None:
    """Numbers first, then the operator profile where there is one."""
    print_metrics(title, measured)
    for name, rows in measured.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            _console().print(f"[bold]{escape(label(name))}[/]")
            print_rows(rows)
        elif isinstance(rows, dict) and rows:
            print_metrics(label(name), rows)


def print_inspection(found: Inspection) -> None:
    from onnxpress.inspection import summary

    console = _console()
    for graph in found.graphs:
        head = _table(graph.file, "")
        head.add_row("parameters", f"{graph.parameters:,}")
        head.add_row("weights", f"{graph.weight_bytes / 1e6:.1f} MB")
        if graph.cache_bytes_per_token:
            head.add_row("cache", f"{graph.cache_bytes_per_token:,} bytes per token")
            memory = ", ".join(f"{graph.memory_bytes(size) / 1e6:.0f} MB at {size:,}" for size in (512, 2048, 8192))
            head.add_row("weights and cache", memory)
        head.add_row("opset", ", ".join(f"{domain or 'ai.onnx'} {number}" for domain, number in graph.opset.items()))
        head.add_row("inputs", escape("\n".join(_collapsed(graph.inputs))))
        head.add_row("outputs", escape("\n".join(_collapsed(graph.outputs))))
        head.add_row("nodes", f"{graph.nodes}: {_counts(graph.operators)}")
        console.print(head)
        layers = _table("weights of", "parameters", "bytes", "formats")
        for group in graph.groups:
            layers.add_row(group.name, f"{group.parameters:,}", f"{group.nbytes:,}", summary(group.formats))
        console.print(layers)
    for warning in found.warnings:
        console.print(f"[yellow]warning[/]  {escape(warning)}")


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with one column per key of the first row."""
    if not rows:
        _console().print("none")
        return
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*(escape(_cell(row.get(key))) for key in rows[0]))
    _console().print(table)


def _console() -> Console:
    """On a terminal its own width; into a pipe a fixed one, so that tables do not break where nobody looks."""
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


def _collapsed(values: Mapping[str, str]) -> list[str]:
    """The cache's many inputs or outputs as one line."""
    plain = [f"{name}: {kind}" for name, kind in values.items() if not name.startswith(("past_key_values.", "present"))]
    cache = [kind for name, kind in values.items() if name.startswith(("past_key_values.", "present"))]
    return [*plain, *([f"cache, {len(cache)} times {cache[0]}"] if cache else [])]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
