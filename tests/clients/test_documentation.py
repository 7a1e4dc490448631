"""The programs in docs/guide/into-your-app.md run as they stand there, on the artifacts that they name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "into-your-app.md"
PROGRAM = re.compile(r"^```(?:python|js)\n(?:#|//) file: (\S+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = {match[1]: match[2] for match in PROGRAM.finditer(PAGE.read_text(encoding="utf-8"))}


def test_every_program_on_the_page_is_found() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(PROGRAMS) == len(re.findall(r"^```(?:python|js)$", page, re.MULTILINE)) >= 6


@pytest.fixture(scope="session")
def folder(smollm2: Callable[[str], Path], minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both artifacts under the names that the page uses, and its programs beside them."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "smollm2-135m-instruct-onnx").symlink_to(smollm2("default"))
    (folder / "all-minilm-l6-v2-onnx").symlink_to(minilm)
    for name, source in PROGRAMS.items():
        (folder / name).write_text(source, encoding="utf-8")
    return folder


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, folder: Path, node: Callable[..., str]) -> None:
    if name.endswith(".mjs"):
        printed = node(folder / name, cwd=folder)
    else:
        done = subprocess.run([sys.executable, name], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        printed = done.stdout
    if name.startswith("embed"):
        same, near, far = ast.literal_eval(printed.strip().splitlines()[-1])
        assert same == pytest.approx(1, abs=2e-3)
        assert near > 0.5 > 0.2 > far
    else:
        assert "Paris" in printed
