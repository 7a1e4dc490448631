"""Structural passes through the driver: what a pass gets beside the graph, and what becomes of what it cut."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from onnxpress import pipeline
from onnxpress.artifact import manifest
from onnxpress.requests import Judging, ModelSource

from .conftest import Run

PRUNE = """
[[pass]]
name = "prune-ffn"
ratio = 0.5
method = "l2"
refit = false
"""
REPAIR = """
[[pass]]
name = "repair"
"""


def test_repair_gets_the_untouched_model(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """The pass before it has narrowed the graph; what is repaired towards is the export, and loss falls."""
    losses = []
    for name, passes in (("pruned", PRUNE), ("repaired", PRUNE + REPAIR)):
        (tmp_path / f"{name}.toml").write_text(passes)
        options = ["--calibration-samples", 16, "--calibration-length", 64, "--no-benchmark", "--logits", "all"]
        outcome = run("build", checkpoint, "-o", tmp_path / name, "-r", tmp_path / f"{name}.toml", *options)
        assert outcome.code == 0, outcome.stderr
        record = manifest.read(tmp_path / name)
        losses.append(record.metrics["kl"])
    step = next(step for step in record.steps if step.name == "repair")
    assert step.matched["product"] > 0
    assert step.errors
    assert losses[1] < losses[0]


NARROW = """
[[pass]]
name = "prune-ffn"
ratio = 0.5
method = "l2"
refit = false
multiple_of = 8
"""
MERGE = """
[[pass]]
name = "reduce-depth"
layers = [1]
method = "merge"
"""
ONE_LAYER = NARROW.replace("ratio", 'include = ["*.layers.1.*"]\nratio')
BLOCKS = """
[[pass]]
name = "quantize-blocks"
bits = 8
block_size = 16
"""
FAST = ("--no-benchmark", "--logits", "all")


@pytest.fixture(scope="module")
def reduced(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact `smaller`, narrower and of fewer layers, in 8 bits, and its `checkpoint`."""
    folder = tmp_path_factory.mktemp("reduced")
    recipe = folder / "recipe.toml"
    recipe.write_text(NARROW + MERGE + BLOCKS)
    pipeline.build(
        ModelSource(str(checkpoint), logits="all"),
        recipe=recipe,
        output=folder / "smaller",
        checkpoint=folder / "checkpoint",
        judging=Judging(benchmark=False),
    )
    return folder


def test_the_checkpoint_is_the_float_model(run: Run, reduced: Path) -> None:
    """It is exported again: the same graph but for 8 bits, which lose little."""
    config = json.loads((reduced / "checkpoint" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 64)
    assert (reduced / "checkpoint" / "tokenizer.json").is_file()
    outcome = run("evaluate", reduced / "smaller", "--reference", reduced / "checkpoint", "--json")
    assert outcome.code == 0, outcome.stderr
    assert 0 < outcome.json["kl"] < 1e-3


def test_inspect_says_and_draws_what_was_cut(run: Run, reduced: Path) -> None:
    found = run("inspect", reduced / "smaller", "--json").json["structure"]
    before, after = (found[part]["stacks"]["model.layers"] for part in ("before", "after"))
    assert [(layer["origin"], layer["width"]) for layer in before] == [(0, 128), (1, 128), (2, 128)]
    assert [(layer["origin"], layer["width"], layer["merged"]) for layer in after] == [(0, 64, [1]), (2, 64, [])]
    # q and o 64 × 64, k and v 64 × 32, gate, up and down 64 × width, two gains
    assert [layer["parameters"] for layer in before] == [2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 128] * 3
    assert [layer["parameters"] for layer in after] == [2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64 + 128] * 2
    assert found["onnx_only"] == []
    text = run("inspect", reduced / "smaller").stdout
    assert re.search(r"^1 merged into 0 +░{10}", text, re.MULTILINE)
    assert re.search(r"^2 .*█████░░░░░ 64 ", text, re.MULTILINE)


def test_what_was_not_cut_is_not_drawn(run: Run, mlp: Path) -> None:
    assert run("inspect", mlp, "--json").json["structure"] is None
    assert "what was cut" not in run("inspect", mlp).stdout


def test_the_report_and_the_card_show_it(reduced: Path) -> None:
    html = (reduced / "smaller" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 1
    assert "model.layers.1, feed-forward: merged into 0</title>" in html
    assert "<td>quantize-blocks</td>" in html
    card = (reduced / "smaller" / "README.md").read_text(encoding="utf-8")
    assert "| model.layers | 3 layers | 2 layers, without 1 |" in card
    assert "| model.layers | 4/2 heads × 16, FFN 128 | 4/2 heads × 16, FFN 64 |" in card


def test_what_was_cut_is_told_of_the_first_export(run: Run, reduced: Path, tmp_path: Path) -> None:
    """An artifact that is optimized again has its reports written anew; what they draw is still there."""
    passes = ("--pass", "fuse-skip-norm")
    outcome = run("optimize", reduced / "smaller", "-o", tmp_path / "again", *passes, "--no-benchmark")
    assert outcome.code == 0, outcome.stderr
    assert "what was cut" in outcome.stdout
    assert "merged into 0" in (tmp_path / "again" / "report.html").read_text(encoding="utf-8")


def test_why_it_is_for_onnx_only_is_said_once(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    second = ONE_LAYER.replace("layers.1.", "layers.2.").replace("0.5", "0.25")
    (tmp_path / "recipe.toml").write_text(ONE_LAYER + second)
    outcome = run("build", checkpoint, "-r", tmp_path / "recipe.toml", *FAST, "-o", tmp_path / "mixed")
    assert outcome.stdout.count("ONNX only") == 1
    assert "ONNX only: layers differ in feed-forward width: 32, 64, 128" in outcome.stdout


def test_layers_that_differ_are_for_onnx_only(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(ONE_LAYER)
    arguments = ("build", checkpoint, "-r", tmp_path / "recipe.toml", *FAST, "-o", tmp_path / "mixed")
    outcome = run(*arguments, "--checkpoint", tmp_path / "checkpoint")
    assert outcome.code == 3
    assert "for ONNX only, no checkpoint can hold it: layers differ in feed-forward width: 64, 128" in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.toml"], "neither is written"
    assert run(*arguments).code == 0
    assert "ONNX only: layers differ in feed-forward width: 64, 128" in (tmp_path / "mixed" / "README.md").read_text()
    drawn = run("inspect", tmp_path / "mixed").stdout
    assert re.search(r"^1 .*█████░░░░░ 64 ", drawn, re.MULTILINE)
    assert "ONNX only" in drawn


def test_a_checkpoint_from_an_artifact(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    assert run("export", checkpoint, "-o", tmp_path / "fp32").code == 0
    passes = ("--pass", "reduce-depth:layers=[0]")
    arguments = ("optimize", tmp_path / "fp32", "-o", tmp_path / "smaller", *passes, "--no-benchmark")
    outcome = run(*arguments, "--checkpoint", tmp_path / "hf")
    assert outcome.code == 0, outcome.stderr
    assert "transformers agrees with the graph" in outcome.stdout
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_hidden_layers"] == 2
    outcome = run(*arguments, "--checkpoint", tmp_path / "hf")
    assert outcome.code == 2
    assert "it would be overwritten" in outcome.stderr


def test_a_checkpoint_in_the_place_of_the_artifact(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("build", checkpoint, "-o", tmp_path / "x", "--checkpoint", tmp_path / "x")
    assert outcome.code == 2
    assert "--checkpoint and --output are the same folder" in outcome.stderr
