"""What can be measured is opened by who can run it: ONNX in onnxruntime, a checkpoint in torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxpress.building.resolving import open_any
from onnxpress.errors import BadInputError, SourceNotFoundError


def test_onnx(make_decoder: Callable[..., Path], tmp_path: Path) -> None:
    path = make_decoder()
    assert open_any(path).kind == open_any(path.parent).kind == "decoder"
    with pytest.raises(SourceNotFoundError):
        open_any(tmp_path / "nothing")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(BadInputError, match=r"has no config\.json"):
        open_any(tmp_path)


def test_a_checkpoint_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "onnxpress.exporter.reference", None)
    monkeypatch.delattr("onnxpress.exporter.reference", raising=False)
    with pytest.raises(BadInputError, match="running one needs torch"):
        open_any(tmp_path)
