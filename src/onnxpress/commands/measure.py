"""evaluate, benchmark, sensitivity, kernels: what a model loses, or would lose, and how fast it is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxpress.commands.options import (
    all_of,
    calibration_options,
    data_options,
    debug_option,
    json_option,
    judging,
    kernel_table_option,
    model_source,
    profile_option,
    recipe_option,
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
def evaluate(model: str, reference: str | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL against a reference; either is an artifact, an ONNX file or folder, or a checkpoint."""
    from onnxpress import api
    from onnxpress.commands import printing
    from onnxpress.progress import Progress

    source, wanted = model_source(model, options), judging(options)
    with Progress() as progress:
        metrics = api.evaluate(source, reference, judging=wanted, progress=progress).to_dict()
    if as_json:
        printing.print_json(metrics)
    else:
        printing.print_metrics(f"{model} against the reference", metrics)


@click.command(short_help="Speed and memory on this machine.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-p", "--profile", metavar="NAME", help="Session options to use. [default: the artifact's own]")
@click.option("--operators", is_flag=True, help="Also show where the time goes, by operator.")
@_common
def benchmark(folder: Path, as_json: bool, **options: Any) -> None:
    """Measure prefill, decode, latency, load time and peak memory of an artifact or an ONNX file."""
    from onnxpress import api
    from onnxpress.commands import printing
    from onnxpress.progress import Progress

    with Progress() as progress:
        measured = api.benchmark(folder, progress=progress, **options).to_dict()
    if as_json:
        printing.print_json(measured)
    else:
        printing.print_benchmark(str(folder), measured)


@click.command(short_help="What a model loses with one product in one format, one block cut, or without one head.")
@click.argument("model")
@profile_option
@recipe_option
@click.option(
    "--every", is_flag=True, help="Measure every loss, not only that of the coarsest of formats that lose alike."
)
@click.option("--structure", is_flag=True, help="Try the cuts of the recipe budget-structure on every block instead.")
@click.option("--heads", is_flag=True, help="Take out every attention head, one at a time, instead, or as well.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw the map, too.")
@calibration_options
@kernel_table_option
@source_options
@_common
def sensitivity(model: str, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Try every format of a recipe on every product of MODEL, every cut on every block, or every attention without one
    of its heads, one at a time, and say what the whole model loses.

    What is found is kept: a search (build --max-loss …) goes on from it, and so does one that was interrupted.
    """
    from onnxpress import pipeline
    from onnxpress.commands import printing
    from onnxpress.progress import Progress
    from onnxpress.search import picture

    source, wanted = model_source(model, options), judging(options)
    with Progress() as progress:
        profile = pipeline.sensitivity(source, judging=wanted, progress=progress, **options)
    if plot is not None:
        picture.plot_profile(profile, plot, model)
    if as_json:
        printing.print_json(profile.to_dict())
    else:
        printing.print_sensitivity(profile)


@click.command(short_help="Time the kernels that a model would use here, for a search on another machine.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE.json")
@profile_option
@recipe_option
@source_options
@_common
def kernels(model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Measure how long each kind of product of MODEL takes here in each format, and write that to a file.

    Give it to a search on another machine with --kernel-table.
    """
    from onnxpress import pipeline
    from onnxpress.commands import printing
    from onnxpress.progress import Progress

    source, wanted = model_source(model, options), judging(options)
    with Progress() as progress:
        table = pipeline.kernels(source, output, judging=wanted, progress=progress, **options)
    if as_json:
        printing.print_json(vars(table))
    else:
        printing.print_rows(table.rows())


COMMANDS: tuple[click.Command, ...] = (evaluate, benchmark, sensitivity, kernels)
