"""The tree of errors in `onnxpress.errors` is the one that the code has, and no exception is missing from it."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import onnxpress
from onnxpress import errors
from onnxpress.errors import OnnxpressError

PACKAGE = Path(onnxpress.__file__).parent
DOCUMENTED = errors.__doc__ or ""
LINE = re.compile(r"^(?P<branch>[│├└─ ]*)(?P<name>\w+Error) +(?P<code>\d+)? +(?P<about>\S.*)$", re.MULTILINE)
INTERNAL = re.compile(r"^ {4}(\w+) +(?:exporter|optimizers)[\w.]* +\S", re.MULTILINE)


def tree(cls: type[OnnxpressError], depth: int = 0) -> Iterator[tuple[int, str, int | None]]:
    """(depth, name, exit code where it is not the base's) of a class and those below it, as they are defined."""
    base = cls.__mro__[1]
    yield depth, cls.__name__, cls.exit_code if getattr(base, "exit_code", None) != cls.exit_code else None
    for below in cls.__subclasses__():
        yield from tree(below, depth + 1)


def walk(folder: Path) -> Iterator[Path]:
    """Every Python file, behind the links to the folders at the top, too."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from walk(path)
        elif path.suffix == ".py":
            yield path


def exceptions() -> dict[str, str]:
    """Module by name, of every class of the package that derives from an exception."""
    bases: dict[str, set[str]] = {}
    module: dict[str, str] = {}
    for path in walk(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                module[node.name] = ".".join(("onnxpress", *path.relative_to(PACKAGE).with_suffix("").parts))

    def raised(name: str) -> bool:
        known = getattr(builtins, name, None)
        if isinstance(known, type) and issubclass(known, BaseException):
            return True
        return any(base != name and raised(base) for base in bases.get(name, ()))

    return {name: where for name, where in module.items() if any(map(raised, bases[name]))}


def test_the_tree_in_the_docstring_is_the_tree_of_the_code() -> None:
    drawn = [
        (len(found["branch"]) // 4, found["name"], int(found["code"]) if found["code"] else None)
        for found in LINE.finditer(DOCUMENTED)
    ]
    assert drawn == list(tree(OnnxpressError))


def test_every_exception_is_in_the_tree_or_named_as_internal() -> None:
    internal = set(INTERNAL.findall(DOCUMENTED))
    found = exceptions()
    in_tree = {name for _, name, _ in tree(OnnxpressError)}
    assert found.keys() == in_tree | internal


@pytest.mark.parametrize("name", sorted(INTERNAL.findall(DOCUMENTED)))
def test_internal_exceptions_are_none_of_the_tree(name: str) -> None:
    """Otherwise `except OnnxpressError` would catch what means "try another way"."""
    pytest.importorskip("torch")
    cls = getattr(importlib.import_module(exceptions()[name]), name)
    assert not issubclass(cls, OnnxpressError)
