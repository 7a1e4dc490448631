"""docs/guide/python.md: its code blocks, run one after another as a reader would, on a tiny model and offline."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import onnxpress

PAGE = Path(onnxpress.__file__).parents[2] / "docs" / "guide" / "python.md"


def test_the_page_runs_as_it_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        line = text[: block.start(1)].count("\n")
        # Empty lines before it, so that a traceback names the line of the page.
        exec(compile("\n" * line + block[1], str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "gate failed: size" in printed
    assert "cost by pass" in printed
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"my-model", "my-model-onnx", "my-model-fp32", "my-model-8bit"}, "nothing of what failed"


def test_the_page_names_every_function_and_request() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in sorted(set(onnxpress.__all__) - {"__version__", "Manifest", "Step"}):
        assert f"`{name}" in text, name
