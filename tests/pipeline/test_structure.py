"""Structural passes through the driver: what a pass gets beside the graph."""

from __future__ import annotations

from pathlib import Path

from onnxpress import manifest

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
