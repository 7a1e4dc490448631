"""Graphs made smaller here: of the genai model builder, in the runtime that it was made for, and of optimum."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress import pipeline
from onnxpress.artifact import manifest
from onnxpress.calibration.data import CalibrationData
from onnxpress.errors import UnsupportedModelError
from onnxpress.graph.anatomy import anatomy_of
from onnxpress.graph.io import load_graph
from onnxpress.requests import Judging
from onnxpress.runtime.decoder import DecoderSession

from .in_optimum import in_optimum

PROMPT = [1, 40, 77, 130, 5]


@pytest.fixture(scope="session")
def built(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime_genai", reason="pip install onnxpress[clients]")
    folder = tmp_path_factory.mktemp("builder")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(tiny_checkpoint)]
    command += ["-o", str(folder / "model"), "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "model"


@pytest.mark.client
def test_anatomy(built: Path) -> None:
    anatomy = anatomy_of(load_graph(built / "model.onnx"))
    assert [block.title for block in anatomy.blocks] == ["model.layers.0", "model.layers.1"]
    for block in anatomy.blocks:
        (attention,) = block.attentions
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 2, 16)
        assert attention.packed
        assert attention.rotary is not None
        assert block.feed_forward is not None
        assert block.feed_forward.down.features == (128, 64)
        assert len(block.norms) == 2
    assert len(anatomy.final_norms) == 1
    assert anatomy.head is not None
    assert anatomy.embeddings


@pytest.mark.client
@pytest.mark.parametrize(
    "passes",
    [
        ["prune-ffn:ratio=0.5", "reduce-depth:drop=1"],
        ["reduce-hidden:width=60"],
        ["trim-vocabulary:tokens=300"],
        ["reduce-heads:ratio=0.5"],
    ],
    ids=["narrower and shallower", "hidden", "vocabulary", "heads"],
)
def test_a_smaller_model_runs_in_its_runtime(built: Path, tmp_path: Path, passes: list[str]) -> None:
    og: Any = pytest.importorskip("onnxruntime_genai", reason="pip install onnxpress[clients]")
    folder = tmp_path / "smaller"
    samples = CalibrationData(samples=4, length=32)
    pipeline.optimize(str(built), output=folder, recipe=passes, judging=Judging(benchmark=False, calibration=samples))
    assert manifest.read(folder).steps[0].name == "fuse-foreign"
    assert json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["num_key_value_heads"] == 2
    session = DecoderSession(next((folder / "onnx").glob("*.onnx")))
    wanted = [int(session.prefill(np.array([PROMPT]))[0, -1].argmax())]
    while len(wanted) < 8:
        wanted.append(int(session.decode(np.array([wanted[-1:]]))[0, -1].argmax()))
    parameters = og.GeneratorParams(model := og.Model(str(folder)))
    parameters.set_search_options(max_length=len(PROMPT) + 8, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    found = []
    while not generator.is_done() and len(found) < 8:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == wanted[: len(found)]
    assert found


DECODER = {
    "vocab_size": 120,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PARTLY_ROTATED = {
    "gpt_neox": ({"rotary_pct": 0.25}, "MultiHeadAttention", 4),
    "stablelm": ({"num_key_value_heads": 2, "partial_rotary_factor": 0.5}, "GroupQueryAttention", 2),
    "phi": ({"partial_rotary_factor": 0.5}, "MultiHeadAttention", 4),
}


def exported_by_optimum(folder: Path, config: dict[str, Any]) -> str:
    in_optimum("optimum_export.py", folder, json.dumps(config))
    return str(folder / "onnx")


@pytest.mark.client
@pytest.mark.parametrize("name", PARTLY_ROTATED)
def test_heads_of_which_a_part_is_rotated(tmp_path: Path, name: str) -> None:
    """optimum's graphs are fused, verified with a prompt, a cache and padding, and have fewer heads then."""
    changes, operator, kv_heads = PARTLY_ROTATED[name]
    folder = exported_by_optimum(tmp_path, DECODER | {"model_type": name} | changes)
    samples = CalibrationData(samples=4, length=32)
    passes = ["reduce-heads:heads=2"]
    pipeline.optimize(
        folder, output=tmp_path / "smaller", recipe=passes, judging=Judging(benchmark=False, calibration=samples)
    )
    fused, reduced = manifest.read(tmp_path / "smaller").steps
    assert fused.matched[operator] == 2
    assert fused.matched["rotations of a part of each head"] == 4
    assert fused.matched.get("heads packed side by side", 0) == (2 if name == "gpt_neox" else 0)
    assert not fused.skipped
    assert reduced.matched == {f"4/{kv_heads} heads × 32 → 2/2 heads × 32": 2}


@pytest.mark.client
def test_a_norm_of_each_head_is_named(tmp_path: Path) -> None:
    folder = exported_by_optimum(tmp_path, DECODER | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32})
    with pytest.raises(UnsupportedModelError, match="QK-norm") as raised:
        pipeline.optimize(
            folder, output=tmp_path / "smaller", recipe=["reduce-heads:heads=2"], judging=Judging(benchmark=False)
        )
    assert "prune-ffn" in str(raised.value.hint)
