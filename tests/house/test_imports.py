"""What may be imported: by the command line at start-up, and by each part of the package from the others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxpress

PACKAGE = Path(onnxpress.__file__).parent
ROOT = PACKAGE.parents[1]
FOLDERS = ("exporter", "optimizers", "runtime_profiles", "models")

# Whatever is not named here lies between the folders and the pipeline: measuring, packaging, reporting.
BETWEEN = 2
LAYERS = {
    "_version": 0,
    "errors": 0,
    "names": 0,
    "stems": 0,
    "artifact": 0,
    "floats": 0,
    "tensors": 0,
    "storage": 0,
    "graph_checks": 0,
    "file_aside": 0,
    "graph_io": 0,
    "session_options": 0,
    "metrics": 0,
    "runtime": 0,
    "decoder_session": 0,
    "manifest": 0,
    "progress": 0,
    "staging": 0,
    "exporter": 1,
    "optimizers": 1,
    "runtime_profiles": 1,
    "models": 1,
    "pipeline": 3,
    "commands": 4,
    "cli": 5,
    "__main__": 6,
}
BETWEEN_FOLDERS = {("exporter", "models")}
"""Folders do not import each other, but for the catalog, which says where checkpoints are."""
ONLY_IN_EXPORTER = {"torch", "transformers", "optimum", "gguf", "huggingface_hub", "sentencepiece", "accelerate"}


def sources() -> list[tuple[str, Path]]:
    """(part, file) for every Python file of the package; a folder is one part."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py", recurse_symlinks=True) if sys.version_info >= (3, 13) else _walk(PACKAGE)):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            found.append((relative.parts[0].removesuffix(".py"), path))
    return found


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix == ".py":
            yield path


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports; `top_only`: when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["onnxpress", *path.relative_to(PACKAGE).parts[:-1]]
    for node in _statements(tree, functions=not top_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """Everything outside `if TYPE_CHECKING` blocks and, unless they count, functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node, functions=functions)


@pytest.fixture(scope="module")
def files() -> list[tuple[str, Path]]:
    return sources()


def test_all_four_folders_are_walked(files: list[tuple[str, Path]]) -> None:
    assert set(FOLDERS) <= {part for part, _ in files}


def test_no_layer_is_given_to_what_is_not_there(files: list[tuple[str, Path]]) -> None:
    assert LAYERS.keys() - {part for part, _ in files} <= {"__main__"}


def test_imports_point_downwards(files: list[tuple[str, Path]]) -> None:
    wrong = []
    for part, path in files:
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] != "onnxpress" or len(pieces) == 1 or pieces[1] == part:
                continue
            mine, other = LAYERS.get(part, BETWEEN), LAYERS.get(pieces[1], BETWEEN)
            if pieces[1].startswith("__version"):
                continue
            folders = part in FOLDERS and pieces[1] in FOLDERS
            if other > mine or (folders and (part, pieces[1]) not in BETWEEN_FOLDERS):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_the_exporter_alone_imports_torch_and_its_kin(files: list[tuple[str, Path]]) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for part, path in files
        if part != "exporter"
        for name in imports(path)
        if name.split(".")[0] in ONLY_IN_EXPORTER
    ]
    assert wrong == []


def test_passes_do_not_import_the_runtime_at_the_top(files: list[tuple[str, Path]]) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for part, path in files
        if part == "optimizers"
        for name in imports(path, top_only=True)
        if name.split(".")[0] == "onnxruntime"
    ]
    assert wrong == []


def test_the_command_line_imports_click_and_nothing_else_at_the_start() -> None:
    code = "import sys; before = set(sys.modules); import onnxpress.cli; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    top = {name.split(".")[0] for name in result.stdout.split()}
    assert top - set(sys.stdlib_module_names) <= {"onnxpress", "click"}
    ours = {name for name in result.stdout.split() if re.match(r"onnxpress\b", name)}
    assert not {
        name
        for name in ours
        if name.split(".")[1:2] and name.split(".")[1] not in ("_version", "cli", "commands", "errors")
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_names_of_the_folders_are_banned(folder: str) -> None:
    """`import optimizers` would work from the root of the checkout and nowhere else."""
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", ROOT / "ruff.toml", "--select", "TID251", "-"],
        input=f"import {folder}\nfrom {folder} import something\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.count("TID251") == 2, result.stdout + result.stderr
