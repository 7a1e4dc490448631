"""What tracing found is found again, and only for the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from onnxpress.artifact.artifact import Source
from onnxpress.exporter import architectures, parity
from onnxpress.exporter import trace_checkpoint as tracing
from onnxpress.exporter.export import export
from onnxpress.exporter.layers import export_cache
from onnxpress.exporter.sources.checkpoint import Checkpoint, load_folder
from onnxpress.graph.io import save_graph


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "cache"))


def checkpoint(folder: Path, seed: int = 0) -> Checkpoint:
    folder.mkdir()
    architectures.tiny_model("llama", folder, seed=seed)
    return load_folder(folder, Source("llama", "huggingface-folder"))


def never(*_: object) -> None:
    raise AssertionError("traced again")


def test_another_checkpoint_of_the_same_shape_is_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(checkpoint(tmp_path / "first"))
    (tmp_path / "second").mkdir()
    model = architectures.tiny_model("llama", tmp_path / "second", seed=7)
    monkeypatch.setattr(tracing, "trace_checkpoint", never)
    again = export(load_folder(tmp_path / "second", Source("llama", "huggingface-folder")))
    assert again.export["method"] == "fused"
    assert max(parity.differences(again, model, tmp_path).values()) <= architectures.TOLERANCE


def test_the_second_export_needs_no_torch(tmp_path: Path) -> None:
    export(checkpoint(tmp_path / "first"))
    program = f"""
import sys
from pathlib import Path
from onnxpress.artifact.artifact import Source
from onnxpress.exporter.sources.checkpoint import load_folder
from onnxpress.exporter.export import export
from onnxpress.graph.io import save_graph
export(load_folder(Path({str(tmp_path / "first")!r}), Source("llama", "huggingface-folder")))
print("torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


def test_the_key_holds_all_that_matters(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "first")
    key = export_cache.entry_key(one, None, None)
    assert key == export_cache.entry_key(replace(one, source=Source("elsewhere", "hub")), None, None)
    others = [
        export_cache.entry_key(one, "text-generation", None),
        export_cache.entry_key(one, None, 32),
        export_cache.entry_key(replace(one, config={**one.config, "rms_norm_eps": 1e-3}), None, None),
        export_cache.entry_key(replace(one, tensors=dict(list(one.tensors.items())[1:])), None, None),
    ]
    assert len({key, *others}) == 5
    assert export_cache.entry_key(replace(one, trust_remote_code=True), None, None) is None


def test_a_damaged_entry_is_traced_again(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "first")
    export(one)
    (kept,) = (tmp_path / "cache" / "exports").iterdir()
    (kept / "model.onnx").write_bytes(b"\x08")
    facts = json.loads((kept / "entry.json").read_text())
    assert facts["described"]["method"] == "fused"
    assert export(one).export["method"] == "fused"
    assert (kept / "model.onnx").stat().st_size > 1000


def test_the_first_export_and_the_next_give_the_same_bytes(tmp_path: Path) -> None:
    one = checkpoint(tmp_path / "first")
    written = []
    for number in range(2):
        save_graph(export(one).graphs["model"], tmp_path / f"{number}.onnx")
        written.append((tmp_path / f"{number}.onnx").read_bytes())
    assert written[0] == written[1]
