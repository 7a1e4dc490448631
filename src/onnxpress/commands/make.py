"""build, export, optimize: from a model to an artifact folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxpress.commands.options import (
    all_of,
    calibration_options,
    checkpoint_option,
    data_options,
    debug_option,
    export_options,
    gate_options,
    json_option,
    judging,
    model_source,
    output_option,
    profile_option,
    recipe_option,
    search_options,
    source_options,
    threads_option,
)

if TYPE_CHECKING:
    from onnxpress.pipeline import BuildResult

_common = all_of(threads_option, json_option, debug_option)


@click.command(short_help="From a checkpoint to a verified artifact: export, optimize, measure, package.")
@click.argument("model")
@profile_option
@recipe_option
@output_option()
@checkpoint_option
@gate_options
@search_options
@data_options
@calibration_options
@click.option("--no-benchmark", is_flag=True, help="Measure quality only, not speed and memory.")
@export_options
@source_options
@_common
def build(model: str, as_json: bool, **options: Any) -> None:
    """Build an artifact from MODEL: export it, run the recipe's passes, verify each, measure, hold it to the gates.

    With a limit and no --recipe, a search decides which product gets which format; with --max-parameters or
    --target-size also which block is cut how (docs/guide/search.md).

    Exit codes: 2 usage, 3 bad input, 4 a gate failed (nothing is written), 5 verification failed, 6 cannot write.

    \b
    onnxpress build smollm2-135m-instruct
    onnxpress build ./my-model -o app/model --max-loss 1% --max-size 60MB
    """
    from onnxpress import pipeline
    from onnxpress.progress import Progress

    source, wanted = model_source(model, options), judging(options)
    with Progress() as progress:
        result = pipeline.build(source, judging=wanted, progress=progress, **options)
    _print(result, as_json)


@click.command(short_help="Only the first step: a checkpoint as an fp32 ONNX artifact.")
@click.argument("model")
@output_option()
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="How the file holds weight matrices; auto: as the checkpoint does. Arithmetic stays float32.",
)
@export_options
@source_options
@_common
def export(model: str, as_json: bool, **options: Any) -> None:
    """Export MODEL to an artifact with the fp32 graph, fused where the runtime has the operators, and verify it."""
    from onnxpress import pipeline
    from onnxpress.progress import Progress

    source = model_source(model, options)
    with Progress() as progress:
        result = pipeline.export(source, progress=progress, **options)
    _print(result, as_json)


@click.command(short_help="Only the later steps: run passes on an artifact or an ONNX file.")
@click.argument("source")
@output_option(required=True)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="NAME[:k=v,…]",
    help="A pass to run, in order; repeatable. List them: onnxpress list passes.",
)
@checkpoint_option
@recipe_option
@profile_option
@gate_options
@search_options
@data_options
@calibration_options
@click.option("--no-benchmark", is_flag=True, help="Measure quality only, not speed and memory.")
@_common
def optimize(source: str, passes: tuple[str, ...], recipe: str | None, as_json: bool, **options: Any) -> None:
    """Run passes on SOURCE (an artifact, an ONNX file or a folder with one) and verify each against it.

    \b
    onnxpress optimize bert.onnx -o bert-small --pass clean-up --pass quantize-dynamic
    onnxpress optimize my-artifact -o smaller --recipe smallest
    """
    from onnxpress import pipeline
    from onnxpress.errors import UsageError
    from onnxpress.progress import Progress

    wanted = judging(options)
    if passes and recipe:
        raise UsageError("--pass and --recipe exclude each other")
    with Progress() as progress:
        result = pipeline.optimize(source, recipe=passes or recipe, judging=wanted, progress=progress, **options)
    _print(result, as_json)


COMMANDS: tuple[click.Command, ...] = (build, export, optimize)


def _print(result: BuildResult, as_json: bool) -> None:
    from onnxpress.commands import printing

    if as_json:
        printing.print_json({"path": str(Path(result.path)), **result.manifest.model_dump()})
    else:
        printing.print_build(result)
