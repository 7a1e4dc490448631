"""Recipes as TOML tables: where they are found, and how one that `extends` another becomes whole.

    extends = "cpu-decoder"         # a recipe of the package, or a path to a .toml file, relative to this one
    remove = ["quantize-experts"]   # inherited entries that go, by name, whatever kind of table they are in

    [[pass]]                        # inherited: the options named here change, the others stay, and so does its place
    name = "quantize-embedding"
    block_size = 64

    [[pass]]                        # not inherited: new, in the end, or before the entry that `before` names
    name = "smooth"
    before = "quantize-embedding"

`[[cut]]`, `[[format]]` and `[[after]]` follow the same rules. Where a name stands several times the first entry here is
for the first inherited one, the second for the second; one more is new. `before` moves an inherited entry. A format or
cut that names another pass, or `passes`, inherits nothing of the old one. `[importance]`: own patterns come first.
`name` and `description` are not inherited. `artifact.json` holds the whole recipe, with nothing to look up elsewhere.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from onnxpress.errors import UsageError, unknown_name

ENTRIES = {"pass": "a name", "cut": "a name and a pass", "format": "a name and a pass", "after": "a name"}
"""Kinds of tables that a recipe has many of, and what each must have."""
_KEYS = ("name", "description", "extends", "remove", "importance", *ENTRIES)

Table = dict[str, Any]


class RecipeFile(NamedTuple):
    """The text of a recipe and what errors call it; `folder`: where its paths start, None for one of the package."""

    text: str
    label: str
    folder: Path | None = None


@cache
def packaged() -> dict[str, str]:
    """TOML text by name, of the recipes in the package."""
    folder = resources.files("onnxpress.optimizers") / "recipes"
    if not folder.is_dir():
        return {}
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    }


def find_recipe(name: str, folder: Path | None = None, kind: str = "recipe") -> RecipeFile:
    """Read the recipe of that name, or the .toml file at that path from `folder`; UsageError where there is neither."""
    path = (folder or Path()) / name
    if path.suffix == ".toml" and path.is_file():
        return RecipeFile(path.read_text(encoding="utf-8"), path.name, path.parent.resolve())
    known = packaged()
    if name not in known:
        raise unknown_name(kind, name, known, see="onnxpress list recipes")
    return RecipeFile(known[name], f"{name}.toml")


def read_recipe_table(file: RecipeFile, extending: Sequence[RecipeFile] = ()) -> Table:
    """Parse a recipe, with what it inherits written out; `extending`: the recipes that inherit from this one.

    Raises UsageError for what is not TOML, unknown keys and names, entries without a name, circles.
    """
    label = file.label
    try:
        table = tomllib.loads(file.text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{label}: not TOML: {error}", hint="correct the file there") from error
    for key in table:
        if key not in _KEYS:
            raise unknown_name(f"key in {label}", key, _KEYS)
    for key, has in ENTRIES.items():
        checked_entries(table, key, has, label)
    if not isinstance(table.get("importance", {}), dict):
        raise UsageError(f"{label}: importance is a table of numbers from 0, by pattern of weight names")
    if "extends" not in table:
        return _alone(table, label)
    extends = table["extends"]
    if not isinstance(extends, str):
        raise UsageError(f"{label}: extends is the name of a recipe or a path, not {extends!r}")
    chain = (*extending, file)
    base = find_recipe(extends, file.folder, f"recipe that {label} extends")
    if any((one.label, one.folder) == (base.label, base.folder) for one in chain):
        circle = " → ".join([*(one.label for one in chain), base.label])
        raise UsageError(f"{label}: extends leads in a circle: {circle}", hint="let one of them stand alone")
    return extend(read_recipe_table(base, chain), table, label)


def checked_entries(table: Mapping[str, Any], key: str, has: str, label: str) -> list[Table]:
    """The tables under `key`, each with a name."""
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(
        isinstance(row, dict) and isinstance(row.get("name"), str) for row in entries
    ):
        raise UsageError(f"{label}: every {key} is a [[{key}]] table with {has}")
    return entries


def extend(base: Table, own: Table, label: str) -> Table:
    """Lay the tables of a recipe over those that it inherits, see above. Neither is changed."""
    base = _without(base, own.get("remove", []), label)
    whole: Table = {key: own[key] for key in ("name", "description") if key in own}
    for key in ENTRIES:
        if entries := _laid_over(base.get(key, []), own.get(key, []), label):
            whole[key] = entries
    importance = own.get("importance", {})
    if importance := importance | {
        key: value for key, value in base.get("importance", {}).items() if key not in importance
    }:
        whole["importance"] = importance
    return whole


def _alone(table: Table, label: str) -> Table:
    """The table of a recipe that extends none, and therefore removes and places nothing."""
    placed = any("before" in row for key in ENTRIES for row in table.get(key, []))
    if placed or "remove" in table:
        key = "before" if placed else "remove"
        raise UsageError(f"{label}: {key} is for a recipe that extends another", hint='extends = "cpu-decoder"')
    return table


def _without(base: Table, names: Any, label: str) -> Table:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{label}: remove is a list of names of inherited entries, not {names!r}")
    known = {row["name"] for key in ENTRIES for row in base.get(key, [])}
    for name in names:
        if name not in known:
            raise unknown_name(f"entry to remove in {label}", name, known)
    return base | {key: [row for row in base[key] if row["name"] not in names] for key in ENTRIES if key in base}


def _laid_over(inherited: Sequence[Table], own: Sequence[Table], label: str) -> list[Table]:
    result = list(inherited)
    times: Counter[str] = Counter()
    for row in own:
        name, before = row["name"], row.get("before")
        entry = {key: value for key, value in row.items() if key != "before"}
        same = [old for old in inherited if old["name"] == name]
        place = len(result)
        if times[name] < len(same):
            old = same[times[name]]
            place = next(index for index, one in enumerate(result) if one is old)
            entry = _changed(result.pop(place), entry)
        times[name] += 1
        if before is not None:
            names = [one["name"] for one in result]
            if before not in names:
                raise unknown_name(f"entry to put {name} before in {label}", str(before), names)
            place = names.index(before)
        result.insert(place, entry)
    return result


def _changed(old: Table, entry: Table) -> Table:
    """An inherited entry with other options; nothing of it is left where the pass is another one."""
    another = "passes" in entry or entry.get("pass", old.get("pass")) != old.get("pass")
    return entry if another else old | entry
