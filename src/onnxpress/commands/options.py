"""Options that commands share, and values with units."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from onnxpress.requests import Judging, ModelSource

F = TypeVar("F", bound=Callable[..., Any])

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_NUMBERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_MILLISECONDS = {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3}
_FRACTIONS = {"": 1.0, "%": 0.01}


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in recent versions only
    """A positive number with a unit out of a table, converted to the table's base; or a share of the model, in %."""

    def __init__(self, name: str, units: dict[str, float] | dict[str, int], example: str, shares: bool = False) -> None:
        self.name, self._units, self._example, self._shares = name, units, example, shares

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z%]*)", value.strip())
        if match is not None and match[2] == "%" and self._shares:
            from onnxpress.requests import Share

            return Share(0.01 * float(match[1]))
        if match is None or match[2].lower() not in self._units:
            self.fail(f"{value!r} is not a {self.name} such as {self._example}", param, ctx)
        return float(match[1]) * self._units[match[2].lower()]


SIZE = Quantity("size", _BYTES, "60MB")
MODEL_SIZE = Quantity("size", _BYTES, "60MB or 25%", shares=True)
PARAMETERS = Quantity("number", _NUMBERS, "100M or 80%", shares=True)
DURATION = Quantity("duration", _MILLISECONDS, "10ms")
FRACTION = Quantity("fraction", _FRACTIONS, "1%")


def _set_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(dict)["debug"] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
profile_option = click.option(
    "-p",
    "--profile",
    default="cpu",
    show_default="this machine's",
    metavar="NAME",
    help="Target: onnxpress list profiles.",
)
recipe_option = click.option(
    "-r", "--recipe", metavar="NAME|FILE", help="Passes to run: onnxpress list recipes. [default: the profile's]"
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: one per core]")

_FOLDER = click.Path(file_okay=True, path_type=Path)
_TEXT = click.Path(exists=True, dir_okay=False, path_type=Path)


def all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Join several options in one decorator, in the order in which --help shows them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


source_options = all_of(
    click.option("--offline", is_flag=True, help="Use only what is on this machine already."),
    click.option("--allow-pickle", is_flag=True, help="Read pickled weights: they can run any code."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings along."),
)
export_options = all_of(
    click.option("--task", metavar="NAME", help="optimum's task name. [default: from the architecture]"),
    click.option("--logits", type=click.Choice(["all", "last"]), help="Positions a decoder computes logits for."),
    click.option("--context-length", type=click.IntRange(min=1), help="Longest sequence. [default: the model's]"),
)
data_options = all_of(
    click.option("--text", type=_TEXT, help="Measure on this text. [default: text the model writes itself]"),
    click.option("--pairs", type=_TEXT, help="Measure on scored sentence pairs: CSV or TSV of two texts and a score."),
)
calibration_options = all_of(
    click.option(
        "--calibration",
        metavar="FILE|FOLDER|NAME",
        help="Calibrate with this: text, .jsonl, .csv, .npz, a folder of .wav, a data set. "
        "[default: text the model writes itself]",
    ),
    click.option(
        "--calibration-samples", type=click.IntRange(min=1), metavar="N", help="Rows. [default: what a pass needs]"
    ),
    click.option(
        "--calibration-length", type=click.IntRange(min=2), metavar="N", help="Tokens in a row. [default: likewise]"
    ),
    click.option("--calibration-seed", type=int, default=1, show_default=True, help="Of the text the model writes."),
)
gate_options = all_of(
    click.option(
        "--max-loss",
        type=FRACTION,
        metavar="1%",
        help="Largest rise of perplexity (decoders), or of 1 - mean cosine (encoders), against the reference.",
    ),
    click.option(
        "--max-size",
        type=MODEL_SIZE,
        metavar="60MB|25%",
        help="Largest size of the graphs with their weights, or a share of the float32 model's.",
    ),
    click.option("--max-latency", type=DURATION, metavar="10ms", help="Slowest token (decoders) or call, here."),
    click.option("--max-memory", type=SIZE, metavar="300MB", help="Largest peak of resident memory, here."),
    click.option(
        "--max-parameters",
        type=PARAMETERS,
        metavar="100M|80%",
        help="Most parameters, or a share of the model's: a search cuts blocks where that loses least.",
    ),
)
kernel_table_option = click.option(
    "--kernel-table",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Times of another device's kernels: onnxpress kernels, run there. [default: measured here]",
)
search_options = all_of(
    click.option(
        "--target-size",
        type=MODEL_SIZE,
        metavar="60MB|25%",
        help="--max-size, and a search that cuts blocks as well as choosing formats.",
    ),
    click.option(
        "--minimize",
        type=click.Choice(["loss", "size", "latency", "prompt"]),
        help="Of all mixes of cuts and formats that keep the limits, take the one with least of this. "
        "[default: the first of size, loss, latency without a limit]",
    ),
    kernel_table_option,
)


def model_source(model: str, options: dict[str, Any]) -> ModelSource:
    """Take the values of `source_options` and `export_options` out of a command's."""
    from onnxpress.requests import ModelSource

    names = ("task", "context_length", "logits", "offline", "allow_pickle", "trust_remote_code")
    return ModelSource(model, **_taken(options, *names))


def judging(options: dict[str, Any]) -> Judging:
    """Take the values of `data_options`, `calibration_options`, `gate_options`, `search_options` and what else says how
    a model is judged out of a command's."""
    from onnxpress.calibration.data import CalibrationData
    from onnxpress.errors import UsageError
    from onnxpress.requests import Gates, Judging, SearchOptions

    target = options.pop("target_size", None)
    if target is not None and options["max_size"] is not None:
        raise UsageError("--target-size and --max-size exclude each other", hint="both limit the size")
    if target is not None:
        options["max_size"] = target
    gates = _taken(options, "max_loss", "max_size", "max_latency", "max_memory", "max_parameters")
    calibration = _taken(options, "calibration", "calibration_samples", "calibration_length", "calibration_seed")
    return Judging(
        calibration=CalibrationData(*calibration.values()),
        gates=Gates(**gates),
        search=SearchOptions(structure=target is not None, **_taken(options, "minimize", "kernel_table")),
        benchmark=not options.pop("no_benchmark", False),
        **_taken(options, "text", "pairs", "threads"),
    )


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Take the values of these names out of options, those that a command has."""
    return {name: options.pop(name) for name in names if name in options}


checkpoint_option = click.option(
    "--checkpoint",
    type=_FOLDER,
    metavar="DIR",
    help="Also write the model, as it is before weights are packed or quantized, as a Hugging Face checkpoint.",
)


def output_option(required: bool = False) -> Callable[[F], F]:
    """Return the option -o, with a default unless it is required."""
    return click.option(
        "-o",
        "--output",
        type=_FOLDER,
        required=required,
        metavar="DIR",
        help="Artifact folder; an artifact there is replaced." + ("" if required else " [default: ./NAME-onnx]"),
    )
