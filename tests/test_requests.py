"""Requests: a source and how it is judged, made from the options of a command or by hand."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from onnxpress.calibration.data import CalibrationData
from onnxpress.commands.make import build, export, optimize
from onnxpress.commands.measure import evaluate, kernels, sensitivity
from onnxpress.commands.options import judging, model_source
from onnxpress.errors import UnsupportedModelError, UsageError
from onnxpress.requests import Gates, Judging, ModelSource, SearchOptions, Share

REST = {
    "build": {"profile", "recipe", "output", "checkpoint", "as_json"},
    "export": {"output", "dtype", "as_json"},
    "optimize": {"profile", "recipe", "output", "checkpoint", "passes", "as_json"},
    "evaluate": {"reference", "as_json"},
    "sensitivity": {"profile", "recipe", "every", "structure", "heads", "plot", "as_json"},
    "kernels": {"profile", "recipe", "output", "as_json"},
}
"""Options of commands that are no part of a request."""


def options(command: Any, *arguments: str) -> dict[str, Any]:
    """The options of a command as it gets them, its first argument left out."""
    found = dict(command.make_context(command.name, ["model", *arguments]).params)
    found.pop("source" if command is optimize else "model")
    return found


@pytest.mark.parametrize("command", [build, export, optimize, evaluate, sensitivity, kernels], ids=lambda one: one.name)
def test_all_options_of_a_command_have_a_place(command: Any) -> None:
    given = options(command, *(["-o", "out"] if command in (optimize, kernels) else []))
    assert model_source("model", given) == ModelSource("model")
    assert judging(given) == Judging()
    assert given.keys() - {"threads"} == REST[command.name]


def test_options_become_a_request(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    text = str(tmp_path / "text.txt")
    flags = [
        "--offline",
        "--logits",
        "all",
        "--context-length",
        "64",
        "--no-benchmark",
        "--threads",
        "2",
        "--text",
        text,
    ]
    limits = ["--target-size", "25%", "--max-latency", "10ms", "--minimize", "loss", "--kernel-table", "times.json"]
    given = options(build, *flags, *limits, "--calibration", "a.txt", "--calibration-samples", "8")
    assert model_source("name", given) == ModelSource("name", context_length=64, logits="all", offline=True)
    assert judging(given) == Judging(
        text=Path(text),
        calibration=CalibrationData("a.txt", samples=8),
        gates=Gates(max_size=0.25, max_latency=10.0),
        search=SearchOptions(minimize="loss", kernel_table=Path("times.json"), structure=True),
        benchmark=False,
        threads=2,
    )
    with pytest.raises(UsageError, match="exclude each other"):
        judging(options(build, "--target-size", "25%", "--max-size", "1MB"))


def test_a_name_or_a_path_is_a_source() -> None:
    source = ModelSource("hf:owner/name", offline=True)
    assert ModelSource.of(source) is source
    assert ModelSource.of("name") == ModelSource("name")
    assert ModelSource.of(Path("folder") / "model.onnx") == ModelSource("folder/model.onnx")


def test_shares_become_amounts_and_amounts_stay() -> None:
    gates = Gates(max_loss=0.01, max_size=Share(0.25), max_parameters=Share(0.5))
    assert gates.in_amounts(400.0, 10.0) == Gates(max_loss=0.01, max_size=100.0, max_parameters=5.0)
    assert Gates(max_size=7.0).in_amounts(400.0, None) == Gates(max_size=7.0)
    with pytest.raises(UnsupportedModelError, match="50% of how many parameters"):
        gates.in_amounts(400.0, None)


def test_what_is_not_known_does_not_pass() -> None:
    (found,) = Gates(max_latency=1.0).check({"size_bytes": 1.0})
    assert (found.name, found.passed) == ("max_latency_ms", False)


@pytest.mark.parametrize(
    ("gates", "objective"),
    [
        (Gates(max_loss=0.01), "size"),
        (Gates(max_size=1e6), "loss"),
        (Gates(max_size=1e6, max_loss=0.01), "latency"),
        (Gates(max_size=1e6, max_loss=0.01, max_latency=1.0), "loss"),
    ],
)
def test_a_search_minimises_what_has_no_limit(gates: Gates, objective: str) -> None:
    assert SearchOptions().objective(gates) == objective
    assert SearchOptions(minimize="prompt").objective(gates) == "prompt"


@pytest.mark.parametrize("request_type", [ModelSource, Judging, Gates, SearchOptions])
def test_requests_cannot_be_changed(request_type: Any) -> None:
    made = request_type("x") if request_type is ModelSource else request_type()
    with pytest.raises(AttributeError):
        setattr(made, fields(made)[0].name, None)
