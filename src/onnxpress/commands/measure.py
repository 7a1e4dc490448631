"""evaluate, benchmark: what an artifact loses, and how fast it is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxpress.commands.options import (
    all_of,
    data_options,
    debug_option,
    json_option,
    source_options,
    threads_option,
)

_common = all_of(threads_option, json_option, debug_option)


@click.command(short_help="Compare two of {artifact, ONNX, checkpoint}: KL, top-1, perplexity, cosine, rank.")
@click.argument("model")
@click.option("--reference", metavar="X", help="What to compare with. [default: the source that the artifact names]")
@data_options
@source_options
@_common
def evaluate(model: str, as_json: bool, **options: Any) -> None:
    """Measure MODEL against a reference; either is an artifact, an ONNX file or folder, or a checkpoint."""
    from onnxpress import finished, report
    from onnxpress.progress import Progress

    with Progress() as progress:
        metrics = finished.evaluate(model, progress=progress, **options)
    if as_json:
        report.print_json(metrics)
    else:
        report.print_metrics(f"{model} against the reference", metrics)


@click.command(short_help="Speed and memory on this machine.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-p", "--profile", metavar="NAME", help="Session options to use. [default: the artifact's own]")
@click.option("--operators", is_flag=True, help="Also show where the time goes, by operator.")
@_common
def benchmark(folder: Path, as_json: bool, **options: Any) -> None:
    """Measure prefill, decode, latency, load time and peak memory of an artifact or an ONNX file."""
    from onnxpress import finished, report
    from onnxpress.progress import Progress

    with Progress() as progress:
        measured = finished.benchmark(folder, progress=progress, **options)
    if as_json:
        report.print_json(measured)
    else:
        report.print_benchmark(str(folder), measured)


COMMANDS: tuple[click.Command, ...] = (evaluate, benchmark)
