"""A graph of onnxruntime-genai's model builder, made smaller here, in the runtime that it was made for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxpress import manifest, pipeline
from onnxpress.calibration import CalibrationData
from onnxpress.decoder_session import DecoderSession
from onnxpress.graph_io import load_graph
from onnxpress.optimizers.anatomy import anatomy_of

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
    pipeline.optimize(str(built), output=folder, passes=passes, benchmark=False, calibration=samples)
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
