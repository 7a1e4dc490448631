"""The Python API: every name is there, typed, and nothing heavy is loaded before it is asked for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import onnxpress

PACKAGE = Path(onnxpress.__file__).parent
ROOT = PACKAGE.parents[1]
SNIPPET = """
import onnxpress

reveal_type(onnxpress.build("x").manifest.metrics)
reveal_type(onnxpress.evaluate("x", "y").kl)
reveal_type(onnxpress.benchmark("x").latency_ms)
reveal_type(onnxpress.inspect("x").warnings)
reveal_type(onnxpress.verify("x").files)
reveal_type(onnxpress.load_artifact("x").graphs)
onnxpress.build("x", judging=onnxpress.Judging(gates=onnxpress.Gates(max_loss="1%")))
onnxpress.optimize("x")
"""
REVEALED = ("dict[str, float]", "float | None", "float | None", "list[str]", "int", "Mapping[str, Path]")


def test_every_name_is_there_and_of_the_module_that_the_types_say() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (typing,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module for node in typing.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    lazy = {name: module for module, names in onnxpress._MODULES.items() for name in names}
    assert lazy == typed
    assert sorted(onnxpress.__all__) == sorted([*lazy, "__version__"]) == sorted(dir(onnxpress))
    for name in onnxpress.__all__:
        assert getattr(onnxpress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        onnxpress.compress  # noqa: B018


def test_no_module_hides_a_function() -> None:
    """As soon as `onnxpress.x` is imported as a module, that is what the package's attribute x is."""
    modules = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert modules & set(onnxpress.__all__) == set()


def test_functions_and_types_say_what_they_are() -> None:
    for name in set(onnxpress.__all__) - {"__version__"}:
        assert (getattr(onnxpress, name).__doc__ or "").strip(), name


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import onnxpress; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    top = {name.split(".")[0] for name in result.stdout.split()}
    assert top - set(sys.stdlib_module_names) == {"onnxpress"}


@pytest.mark.slow
def test_a_type_checker_sees_the_types(tmp_path: Path) -> None:
    """`reveal_type` of what each function returns, and two calls that are wrong."""
    pytest.importorskip("mypy")
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", "--follow-imports", "silent", snippet]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [line for line in result.stdout.splitlines() if "snippet.py" in line]
    revealed = [line.partition("Revealed type is ")[2].strip('"') for line in lines if "Revealed type" in line]
    short = [re.sub(r"\w+\.", "", text) for text in revealed]  # older versions print `builtins.int`
    assert short == list(REVEALED)
    errors = [line for line in lines if ": error:" in line]
    assert len(errors) == 2, result.stdout
    assert 'Argument "max_loss" to "Gates" has incompatible type "str"' in errors[0]
    assert 'Missing named argument "output" for "optimize"' in errors[1]
