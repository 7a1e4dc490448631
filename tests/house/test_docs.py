"""The documentation: generated pages are up to date, links lead somewhere, lines fit, names of files and code exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import onnxpress

from .test_imports import FLOORS, imports, module_of, room_of, sources

ROOT = Path(onnxpress.__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
GENERATED = ROOT / "docs" / "reference"
WIDEST = 119
ARCHITECTURE = ROOT / "docs" / "internals" / "architecture.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
STOP = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def titled(page: Path) -> str:
    return str(page.relative_to(ROOT))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> Iterator[str]:
    """The lines of a page outside of fenced code."""
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            code = not code
        elif not code:
            yield line


def anchors(page: Path) -> set[str]:
    """The names by which GitHub and the site link to headings: lower case, no punctuation, spaces as hyphens."""
    titles = [line.lstrip("#").strip() for line in prose(page) if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["passes.md", "profiles.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert (GENERATED / name).read_text(encoding="utf-8") == generator().pages()[name], "make docs"


@pytest.mark.parametrize("page", PAGES, ids=titled)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall("\n".join(prose(page))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != GENERATED], ids=titled)
def test_lines_fit(page: Path) -> None:
    """But for rows of tables, which cannot be broken."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDEST and not line.startswith("|")] == []


def test_the_readme_names_every_command() -> None:
    from onnxpress.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"onnxpress ([a-z]+)|`([a-z]+)`", text))
    assert cli.commands.keys() - {word for pair in named for word in pair} <= {"export"}


def test_the_architecture_has_the_floors_that_hold() -> None:
    drawn = re.search(r"<!-- floors -->\n\n```\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)
    assert drawn is not None
    floors = [(int(line.split()[0]), *line.split(maxsplit=1)[1].split(", ")) for line in drawn[1].splitlines()]
    assert floors[::-1] == [(number, *rooms) for number, rooms in enumerate(FLOORS, 1)]


def test_the_stops_of_the_walks_exist() -> None:
    """`room/file.py:name` is a function, a class, or `Class.method`."""
    missing = []
    for file, name in STOP.findall(ARCHITECTURE.read_text(encoding="utf-8")):
        path = ROOT / "src" / "onnxpress" / file
        if not path.is_file() or name not in defined(ast.parse(path.read_text(encoding="utf-8"))):
            missing.append(f"{file}:{name}")
    assert missing == []


def test_the_stops_of_the_walks_are_counted() -> None:
    walks = re.findall(
        r"^## The walk of (.*?)^(\d+) stops in (\d+) files\.$",
        ARCHITECTURE.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert len(walks) == 4
    for walk, stops, files in walks:
        found = set(STOP.findall(walk))
        assert (int(stops), int(files)) == (len(found), len({file for file, _ in found})), walk.splitlines()[0]


def test_a_glossary_has_each_word_once_and_in_order() -> None:
    _, _, glossary = ARCHITECTURE.read_text(encoding="utf-8").partition("## Glossary")
    words = re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", glossary, re.MULTILINE)[1:]
    assert len(words) > 50
    assert words == sorted(set(words), key=str.lower)


def defined(tree: ast.Module | ast.ClassDef, prefix: str = "") -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(f"{prefix}{node.name}")
        if isinstance(node, ast.ClassDef):
            names |= defined(node, f"{prefix}{node.name}.")
    return names


def test_the_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:exporter|optimizers|runtime_profiles|models|src|tests|docs)/[\w./-]*)`", text)
    assert len(named) > 30
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []


def test_each_room_says_what_it_imports() -> None:
    """The sentence "Imports `a`, `b`." of a folder's docstring names what may be imported; "and what lies below" stands
    for the floors below the highest that is named, and the ground floor need not be named."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    arrows: dict[str, set[str]] = {}
    for room, path in sources():
        found = {room_of(module) for name in imports(path) if (module := module_of(name)) is not None}
        arrows[room] = arrows.get(room, set()) | {other for other in found if other != room and floor[other] > 0}
    for room, imported in arrows.items():
        text = ROOT / "src" / "onnxpress" / Path(*room.split(".")) / "__init__.py"
        if not text.is_file():
            continue
        docstring = ast.get_docstring(ast.parse(text.read_text(encoding="utf-8"))) or ""
        sentence = re.split(r"[.;:](?:\s|$)", docstring[docstring.rindex("Imports") :], maxsplit=1)[0]
        named = set(re.findall(r"`([\w.]+)`", sentence))
        assert all(floor[other] < floor[room] for other in named), f"{room} names what it may not import"
        below = max(floor[other] for other in named) if "what lies below" in sentence else 0
        assert {other for other in imported - named if floor[other] >= below} == set(), f"{room} does not name it"
