"""inspect, run, verify, list: look at what there is, try it, check it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from onnxpress.commands.options import all_of, debug_option, json_option, profile_option, threads_option

_reporting = all_of(json_option, debug_option)


@click.command(short_help="Parameters, bytes and format per layer, operators, memory estimate.")
@click.argument("model")
@profile_option
@_reporting
def inspect(model: str, profile: str, as_json: bool) -> None:
    """Say what is in an artifact or an ONNX file, and what the profile's target would object to."""
    from onnxpress import api
    from onnxpress.commands import printing

    overview = api.inspect(model, profile=profile)
    if as_json:
        printing.print_json(overview.to_dict())
    else:
        printing.print_overview(overview)


@click.command(short_help="Text from a prompt (decoders) or the similarity of texts (encoders).")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT…")
@click.option("--max-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1), default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@threads_option
@_reporting
def run(folder: Path, prompts: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Run the artifact in FOLDER: stream the answer to PROMPT, or compare the embeddings of several texts."""
    from onnxpress.building.resolving import open_any
    from onnxpress.commands import printing
    from onnxpress.generation.run import run_prompts

    if as_json:
        printing.print_json(run_prompts(folder, prompts, open_folder=open_any, on_text=lambda text: None, **options))
    else:
        printing.print_run(run_prompts(folder, prompts, open_folder=open_any, on_text=_stream, **options))


@click.command(short_help="Check the hashes of an artifact's files and replay its golden outputs.")
@click.argument("folder", type=click.Path(path_type=Path))
@_reporting
def verify(folder: Path, as_json: bool) -> None:
    """Check that FOLDER holds what was built and that it computes here what it computed then (exit code 5 if not)."""
    from onnxpress import api
    from onnxpress.commands import printing
    from onnxpress.progress import Progress

    with Progress() as progress:
        figures = api.verify(folder, progress=progress).to_dict()
    if as_json:
        printing.print_json(figures)
    else:
        printing.print_metrics(f"{folder} is what was built", figures)


@click.command("list", short_help="Passes, recipes, profiles, models.")
@click.argument("what", type=click.Choice(["passes", "recipes", "profiles", "models"]))
@click.argument("name", required=False)
@click.option("--architectures", is_flag=True, help="models: what is fused, stamped, or falls back, by trying it.")
@_reporting
def list_(what: str, name: str | None, architectures: bool, as_json: bool) -> None:
    """List the passes with their options, the recipes, the profiles, or the models of the catalog.

    With NAME, print one of them in full: a pass with each option explained, a recipe with the options of its passes.
    """
    from onnxpress.commands import printing
    from onnxpress.report import listing

    if architectures and (what != "models" or name):
        raise click.UsageError("--architectures goes with: list models")
    if name:
        item = listing.details(what, name)
        if as_json:
            printing.print_json(item)
        elif what == "passes":
            printing.print_pass(item)
        else:
            printing.print_details(item)
        return
    rows = listing.rows("architectures" if architectures else what)
    if as_json:
        printing.print_json(rows)
    else:
        printing.print_rows(rows)


@click.command(short_help="Which weights of an artifact are zero, as a file of masks.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The file.")
@_reporting
def masks(model: str, output: Path, as_json: bool) -> None:
    """Write which weights of MODEL's products are zero: one bit a weight, for --pass 'prune-weights:masks="FILE"'."""
    from onnxpress.building.masks import extract
    from onnxpress.commands import printing

    figures = extract(model, output)
    if as_json:
        printing.print_json(figures)
    else:
        printing.print_metrics(str(output), figures)


def _stream(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


COMMANDS: tuple[click.Command, ...] = (inspect, run, verify, masks, list_)
