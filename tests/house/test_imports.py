"""What may be imported: by the command line at start-up, and by each part of the package from the others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxpress

PACKAGE = Path(onnxpress.__file__).parent
ROOT = PACKAGE.parents[1]
TESTS = ROOT / "tests"
FOLDERS = ("exporter", "optimizers", "runtime_profiles", "models")

FLOORS = (
    ("_version", "arrays", "errors", "progress"),
    ("files", "models"),
    ("graph",),
    ("graph.anatomy", "runtime"),
    ("evaluation", "runtime_profiles"),
    ("artifact", "calibration", "generation"),
    ("requests",),
    ("exporter.sources", "optimizers", "optimizers.fitting", "optimizers.fusion.decomposed"),
    ("exporter.tracing", "optimizers.heads.maths", "optimizers.quantization.folding", "optimizers.quantization.maths"),
    ("exporter.aten", "exporter.fusing", "optimizers.pruning.maths"),
    ("exporter.layers", "optimizers.depth", "optimizers.heads", "optimizers.quantization"),
    ("exporter", "optimizers.fusion", "optimizers.pruning"),
    ("exporter.writing", "vocabulary"),
    ("report",),
    ("building",),
    ("search",),
    ("api", "pipeline"),
    ("commands",),
    ("cli",),
)
"""Rooms from the ground up: a folder, or a module that is in none. Each may import what is on a floor below its own,
and nothing that is on its own floor or above."""
WIDEST = 20
"""Modules in a folder; whoever needs more makes a room of some of them."""
ONLY_IN_EXPORTER = {"torch", "transformers", "optimum", "gguf", "huggingface_hub", "sentencepiece", "accelerate"}


def sources() -> list[tuple[str, Path]]:
    """(room, file) for every Python file of the package but its own `__init__`."""
    found = []
    for path in sorted(_walk(PACKAGE)):
        relative = path.relative_to(PACKAGE)
        if relative.name != "__init__.py" or len(relative.parts) > 1:
            found.append((room_of(relative), path))
    return found


def room_of(relative: Path) -> str:
    """`graph.anatomy` for graph/anatomy/map.py, `errors` for errors.py."""
    return ".".join(relative.parts[:-1]) or relative.stem


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix == ".py":
            yield path


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Absolute names of what a file imports, for typing alone, too; `top_only`: when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _statements(tree, functions=not top_only, typing=not top_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports from {'.' * node.level}: absolute names only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST, *, functions: bool, typing: bool) -> Iterator[ast.AST]:
    """Everything but, unless they count, functions and `if TYPE_CHECKING` blocks."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing:
            continue
        yield node
        yield from _statements(node, functions=functions, typing=typing)


def module_of(name: str) -> Path | None:
    """The file, relative to the package, that an imported name is found in; None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "onnxpress":
        return None
    while len(parts) > 1:
        relative = Path(*parts[1:])
        if (PACKAGE / relative).with_suffix(".py").is_file():
            return relative.with_suffix(".py")
        if (PACKAGE / relative / "__init__.py").is_file():
            return relative / "__init__.py"
        parts.pop()
    return None


@pytest.fixture(scope="module")
def files() -> list[tuple[str, Path]]:
    return sources()


def test_all_four_folders_are_walked(files: list[tuple[str, Path]]) -> None:
    assert {folder for folder in FOLDERS for room, _ in files if room.split(".")[0] == folder} == set(FOLDERS)


def test_each_room_has_a_floor(files: list[tuple[str, Path]]) -> None:
    assert sorted({room for room, _ in files} - {"__main__"}) == sorted(room for floor in FLOORS for room in floor)


def test_imports_point_downwards(files: list[tuple[str, Path]]) -> None:
    number = {room: index for index, floor in enumerate(FLOORS) for room in floor}
    wrong = []
    for room, path in files:
        for name in imports(path):
            module = module_of(name)
            if module is None:
                continue
            other = room_of(module)
            if other != room and number[other] >= number[room]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_no_circles_inside_a_room(files: list[tuple[str, Path]]) -> None:
    arrows = {
        path.relative_to(PACKAGE): {found for name in imports(path) if (found := module_of(name)) is not None}
        for _, path in files
    }
    open_, done = set[Path](), set[Path]()

    def visit(path: Path, way: list[Path]) -> None:
        assert path not in open_, f"a circle: {' -> '.join(map(str, [*way[way.index(path) :], path]))}"
        if path in done:
            return
        open_.add(path)
        for other in sorted(arrows.get(path, ())):
            if other != path:
                visit(other, [*way, path])
        open_.remove(path)
        done.add(path)

    for path in arrows:
        visit(path, [])


def test_no_room_is_crowded(files: list[tuple[str, Path]]) -> None:
    sizes = Counter(path.parent.relative_to(PACKAGE) for _, path in files if path.name != "__init__.py")
    assert {str(folder): size for folder, size in sizes.items() if size > WIDEST} == {}


def test_each_room_says_what_lives_there(files: list[tuple[str, Path]]) -> None:
    silent = []
    for folder in sorted({path.parent for _, path in files} - {PACKAGE}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        if "Imports" not in text:
            silent.append(str(folder.relative_to(PACKAGE)))
    assert silent == []


def test_tests_mirror_the_rooms(files: list[tuple[str, Path]]) -> None:
    """A folder of tests is called as what it tests; clients, the pipeline end to end and this house are apart."""
    rooms = {str(path.parent.relative_to(PACKAGE)) for _, path in files} | {"clients", "house", "pipeline"}
    folders = {str(path.parent.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    assert folders - rooms == set()


def test_the_exporter_alone_imports_torch_and_its_kin(files: list[tuple[str, Path]]) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for part, path in files
        if part.split(".")[0] != "exporter"
        for name in imports(path)
        if name.split(".")[0] in ONLY_IN_EXPORTER
    ]
    assert wrong == []


def test_passes_do_not_import_the_runtime_at_the_top(files: list[tuple[str, Path]]) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for part, path in files
        if part.split(".")[0] == "optimizers"
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
