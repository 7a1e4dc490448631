"""Structural passes on graphs that others exported, through the command line."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxpress.artifact import manifest

from .conftest import Run

QUICK = ["--no-benchmark", "--calibration-samples", 4, "--calibration-length", 32]


@pytest.fixture(scope="module")
def traced(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as torch's older exporter writes it, from which optimum's exports come: no cache, anonymous weights."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("traced")
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = model.model, model.lm_head

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            logits: torch.Tensor = self.lm_head(states)
            return logits

    ids = torch.randint(0, 250, (2, 7))
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "attention_mask", "logits")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(),
            (ids, torch.ones_like(ids)),
            folder / "model.onnx",
            dynamo=False,
            dynamic_axes=axes,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
        )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    return folder


PASSES = {
    "prune-ffn:ratio=0.5": ("prune-ffn", {"feed-forward 128 -> 64": 3}),
    "reduce-heads:heads=2": ("reduce-heads", {"4/2 heads × 16 → 2/2 heads × 16": 3}),
    "reduce-heads:heads=4,kv_heads=1": ("reduce-heads", {"4/2 heads × 16 → 4/1 heads × 16": 3}),
    "reduce-depth:drop=1": ("reduce-depth", None),
    "reduce-hidden:width=32": ("reduce-hidden", None),
    "low-rank:ratio=0.5": ("low-rank", None),
    "prune-weights:sparsity=0.5": ("prune-weights", None),
}


@pytest.mark.parametrize("spec", PASSES)
def test_structural_passes(run: Run, traced: Path, tmp_path: Path, spec: str) -> None:
    outcome = run("optimize", traced, "-o", tmp_path / "out", "--pass", spec, *QUICK)
    assert outcome.code == 0, outcome.stderr
    record = manifest.read(tmp_path / "out")
    name, matched = PASSES[spec]
    assert [step.name for step in record.steps] == ["fuse-foreign", name]
    assert record.steps[0].matched["names of weights"] == 22  # seven a layer, and the head
    assert matched is None or record.steps[1].matched == matched
    graph = onnx.load(next((tmp_path / "out").rglob("*.onnx")))
    assert not [one.name for one in graph.graph.initializer if one.name.startswith("onnx::")]
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.arange(8)[None]
    (logits,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert np.isfinite(logits).all()


def test_config_follows(run: Run, traced: Path, tmp_path: Path) -> None:
    assert run("optimize", traced, "-o", tmp_path / "out", "--pass", "reduce-depth:drop=1", *QUICK).code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_who_fuses_first_does_not_fuse_twice(run: Run, traced: Path, tmp_path: Path) -> None:
    passes = ["--pass", "fuse-foreign", "--pass", "prune-ffn:ratio=0.5"]
    assert run("optimize", traced, "-o", tmp_path / "out", *passes, *QUICK).code == 0
    assert [step.name for step in manifest.read(tmp_path / "out").steps] == ["fuse-foreign", "prune-ffn"]


def test_other_passes_leave_the_graph_as_it_is(run: Run, traced: Path, tmp_path: Path) -> None:
    assert (
        run("optimize", traced, "-o", tmp_path / "out", "--pass", "quantize-blocks:bits=8,block_size=32", *QUICK).code
        == 0
    )
    assert [step.name for step in manifest.read(tmp_path / "out").steps] == ["quantize-blocks"]
