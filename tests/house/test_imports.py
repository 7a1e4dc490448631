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

# A part may import the parts of lower layers, and those of its own layer that OWN_LAYER names.
LAYERS = {
    0: {"_version", "errors", "names"},
    1: {"artifact", "tensors", "graph_checks", "graph_io", "session_options", "metrics"},
    2: {"runtime", "texts", "models", "manifest", "progress", "staging"},
    3: {"exporter", "optimizers", "runtime_profiles", "evaluation", "generate", "benchmark", "golden", "genai_config"},
    4: {"artifact_folder", "gates", "inspection", "listing"},
    5: {"pipeline", "trial"},
    6: {"report"},
    7: {"commands"},
    8: {"cli", "__main__"},
}
OWN_LAYER = {
    ("names", "errors"),
    ("graph_io", "graph_checks"),
    ("graph_io", "tensors"),
    ("graph_checks", "tensors"),
    ("staging", "manifest"),
    ("texts", "runtime"),
    ("golden", "evaluation"),
    ("golden", "generate"),
    ("benchmark", "evaluation"),
    ("benchmark", "generate"),
    ("evaluation", "generate"),
    ("gates", "artifact_folder"),
    ("inspection", "artifact_folder"),
    ("pipeline", "trial"),
    ("trial", "pipeline"),
}
ONLY_IN_EXPORTER = {"torch", "transformers", "optimum", "gguf", "huggingface_hub", "sentencepiece", "accelerate"}
RANK = {part: rank for rank, parts in LAYERS.items() for part in parts}


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
    for node in _statements(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything outside functions and `if TYPE_CHECKING` blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _statements(node)


@pytest.fixture(scope="module")
def files() -> list[tuple[str, Path]]:
    return sources()


def test_all_four_folders_are_walked(files: list[tuple[str, Path]]) -> None:
    assert set(FOLDERS) <= {part for part, _ in files}


def test_every_part_has_a_layer(files: list[tuple[str, Path]]) -> None:
    assert sorted({part for part, _ in files} - RANK.keys()) == [], "give it a place in LAYERS"


def test_imports_point_downwards(files: list[tuple[str, Path]]) -> None:
    wrong = []
    for part, path in files:
        for name in imports(path):
            pieces = name.split(".")
            if pieces[0] != "onnxpress" or len(pieces) == 1:
                continue
            other = pieces[1] if pieces[1] in RANK else "_version"  # `from onnxpress import __version__`
            allowed = other == part or RANK[other] < RANK[part] or (part, other) in OWN_LAYER
            if not allowed:
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
