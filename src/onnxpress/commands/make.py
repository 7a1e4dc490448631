"""build, export, optimize: from a model to an artifact folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxpress.commands.options import (
    all_of,
    calibration_data,
    calibration_options,
    checkpoint_option,
    data_options,
    debug_option,
    export_options,
    gate_options,
    json_option,
    kernel_table,
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
def build(model: str, **options: Any) -> None:
    """Build an artifact from MODEL: export it, run the recipe's passes, verify each, measure, hold it to the gates.

    With a limit and no --recipe, a search decides which product gets which format; with --max-parameters or
    --target-size also which block is cut how (docs/guide/search.md).

    Exit codes: 2 usage, 3 bad input, 4 a gate failed (nothing is written), 5 verification failed, 6 cannot write.

    \b
    onnxpress build smollm2-135m-instruct
    onnxpress build ./my-model -o app/model --max-loss 1% --max-size 60MB
    """
    from onnxpress import pipeline

    with _progress(options) as progress:
        result = pipeline.build(model, **_keywords(options), progress=progress)
    _print(result, options["as_json"])


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
def export(model: str, **options: Any) -> None:
    """Export MODEL to an artifact with the fp32 graph, fused where the runtime has the operators, and verify it."""
    from onnxpress import pipeline

    with _progress(options) as progress:
        result = pipeline.export(model, **_keywords(options), progress=progress)
    _print(result, options["as_json"])


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
def optimize(source: str, **options: Any) -> None:
    """Run passes on SOURCE (an artifact, an ONNX file or a folder with one) and verify each against it.

    \b
    onnxpress optimize bert.onnx -o bert-small --pass clean-up --pass quantize-dynamic
    onnxpress optimize my-artifact -o smaller --recipe smallest
    """
    from onnxpress import pipeline

    with _progress(options) as progress:
        result = pipeline.optimize(source, **_keywords(options), progress=progress)
    _print(result, options["as_json"])


COMMANDS: tuple[click.Command, ...] = (build, export, optimize)


def _progress(options: dict[str, Any]) -> Any:
    from onnxpress.progress import Progress

    return Progress()


def _keywords(options: dict[str, Any]) -> dict[str, Any]:
    """The options as `onnxpress.pipeline` names them."""
    from onnxpress.build.gates import Gates
    from onnxpress.errors import UsageError
    from onnxpress.search.options import SearchOptions

    rest = {key: value for key, value in options.items() if key != "as_json"}
    if "max_loss" in rest:
        target = rest.pop("target_size")
        if target is not None and rest["max_size"] is not None:
            raise UsageError("--target-size and --max-size exclude each other", hint="both limit the size")
        rest["max_size"] = rest["max_size"] if target is None else target
        names = ("max_loss", "max_size", "max_latency", "max_memory", "max_parameters")
        rest["gates"] = Gates(*(rest.pop(name) for name in names))
        rest["search_options"] = SearchOptions(rest.pop("minimize"), kernel_table(rest), target is not None)
    if "calibration" in rest:
        rest["calibration"] = calibration_data(rest)
    if "no_benchmark" in rest:
        rest["benchmark"] = not rest.pop("no_benchmark")
    return rest


def _print(result: BuildResult, as_json: bool) -> None:
    from onnxpress.commands import printing

    if as_json:
        printing.print_json({"path": str(Path(result.path)), **result.manifest.model_dump()})
    else:
        printing.print_build(result)
