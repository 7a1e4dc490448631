"""Recipes: an ordered list of passes with options. A TOML file is the same list.

    name = "cpu-decoder"
    description = "8-bit blocks, a 4-bit head"

    [[pass]]
    name = "clean-up"

    [[pass]]
    name = "quantize-blocks"
    optional = true          # matching nothing is fine; otherwise it is an error
    bits = 8                 # everything else is an argument of the pass's constructor
    block_size = "auto"      # the profile's value, as if it were left out: [auto.quantize-blocks] block_size

A recipe may leave it to a search which products get which format, and which blocks are cut how (see
`onnxpress.search`): after its passes come the cuts and the formats, each for what the search gave it, and then the
passes under `after`.

    [[format]]
    name = "int8"
    pass = "quantize-dynamic"
    weight_type = "auto"

    [[format]]               # several passes, one after another
    name = "int8 rotated"
    passes = [{ name = "rotate" }, { name = "quantize-dynamic", activations = "per_token" }]

    [[cut]]                  # a structural pass, for the blocks that the search gave it; cuts come before formats
    name = "ffn 75%"
    pass = "prune-ffn"
    ratio = 0.75

    [importance]             # by pattern of weight names: how much more, or less, a loss there counts
    "*.layers.0.*" = 2.0

    [[after]]
    name = "integer-prompts"

A recipe may take over the tables of another one and change some: `extends`, see `onnxpress.optimizers.recipe_files`.

Unknown passes and options raise UsageError with the nearest name; option values are checked against the annotations of
the constructor.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from onnxpress.errors import UsageError, unknown_name
from onnxpress.optimizers import registry
from onnxpress.optimizers.base import Pass
from onnxpress.optimizers.recipe_files import (
    ENTRIES,
    RecipeFile,
    checked_entries,
    find_recipe,
    packaged,
    read_recipe_table,
)

AUTO = "auto"
_OWN_KEYS = {"name", "optional"}


@dataclass(frozen=True)
class PassSpec:
    """One line of a recipe, not yet a pass: options may still say `auto`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False

    def resolve(self, auto: Mapping[str, Mapping[str, Any]]) -> PassSpec:
        """The same with the profile's value for every option that is left out or says `auto`.

        `auto` is the profile's table of that name. Where it has no value the constructor's default holds.
        """
        own = {key: value for key, value in self.options.items() if value != AUTO}
        return PassSpec(self.name, {**auto.get(self.name, {}), **own}, self.optional)

    def build(self) -> Pass:
        """The pass itself. Raises UsageError for an unknown pass, an unknown option or a value of the wrong type."""
        cls = registry.pass_class(self.name)
        known, explained = parameters(cls), f"onnxpress list passes {self.name}"
        values = {}
        for key, value in self.options.items():
            if key not in known:
                raise unknown_name(f"option of {self.name}", key, known, explained=explained)
            values[key] = _checked(self.name, key, value, known[key])
        missing = [
            name
            for name, parameter in known.items()
            if parameter.default is inspect.Parameter.empty and name not in values
        ]
        if missing:
            raise UsageError(
                f"{self.name} needs the option {missing[0]}", hint=f"--pass {self.name}:{missing[0]}=…; see {explained}"
            )
        try:
            return cls(**values)
        except ValueError as error:  # the pass's own opinion of a value of the right type
            raise UsageError(f"{self.name}: {error}", hint=f"see {explained}") from error

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **({"optional": True} if self.optional else {}), **self.options}


@dataclass(frozen=True)
class Recipe:
    """A named list of passes."""

    name: str
    passes: tuple[PassSpec, ...]
    description: str = ""
    formats: Mapping[str, tuple[PassSpec, ...]] = field(default_factory=dict)
    """What a search chooses from for each product, by name."""
    cuts: Mapping[str, tuple[PassSpec, ...]] = field(default_factory=dict)
    """What a search chooses from for each block, by name."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Factors of the losses of weights, by pattern of their names; the first that fits counts."""
    after: tuple[PassSpec, ...] = ()
    """Passes that follow those that a search decided on."""

    @property
    def searched(self) -> bool:
        """Say whether anything is left to a search."""
        return bool(self.formats or self.cuts)

    def resolve(self, auto: Mapping[str, Mapping[str, Any]]) -> Recipe:
        return replace(
            self,
            passes=tuple(spec.resolve(auto) for spec in self.passes),
            formats={name: tuple(spec.resolve(auto) for spec in specs) for name, specs in self.formats.items()},
            cuts={name: tuple(spec.resolve(auto) for spec in specs) for name, specs in self.cuts.items()},
            after=tuple(spec.resolve(auto) for spec in self.after),
        )

    def build(self) -> list[Pass]:
        """All passes, so that a wrong option in the last one is found before the first one runs."""
        for spec in (*chain.from_iterable((*self.formats.values(), *self.cuts.values())), *self.after):
            spec.build()
        return [spec.build() for spec in self.passes]

    def to_dict(self) -> dict[str, Any]:
        """Write the recipe as a TOML file that extends no other would hold it."""
        table: dict[str, Any] = {"name": self.name} | ({"description": self.description} if self.description else {})
        table["pass"] = [spec.to_dict() for spec in self.passes]
        for key, kinds in (("cut", self.cuts), ("format", self.formats)):
            if kinds:
                table[key] = [_format_row(name, specs) for name, specs in kinds.items()]
        if self.importance:
            table["importance"] = dict(self.importance)
        return table | ({"after": [spec.to_dict() for spec in self.after]} if self.after else {})


def recipe_names() -> list[str]:
    return sorted(packaged())


def load_recipe(name: str) -> Recipe:
    """The recipe of that name, or of a TOML file of one's own. Raises UsageError for an unknown name or key."""
    return _recipe(find_recipe(name))


def parse_recipe(text: str, label: str = "recipe") -> Recipe:
    """Parse TOML; `label` names it in errors. Passes and options are checked by `build()`."""
    return _recipe(RecipeFile(text, label))


def _recipe(file: RecipeFile) -> Recipe:
    table, label = read_recipe_table(file), file.label
    passes, cuts, formats, after = (
        checked_entries(table, key, ENTRIES[key], label) for key in ("pass", "cut", "format", "after")
    )
    return Recipe(
        str(table.get("name", label.removesuffix(".toml"))),
        tuple(_spec(row, row["name"], label) for row in passes),
        str(table.get("description", "")),
        {row["name"]: _format(row, "format", label) for row in formats},
        {row["name"]: _format(row, "cut", label) for row in cuts},
        _importance(table.get("importance", {}), label),
        tuple(_spec(row, row["name"], label) for row in after),
    )


def _format(row: Mapping[str, Any], kind: str, label: str) -> tuple[PassSpec, ...]:
    """The passes of a [[format]] or a [[cut]]."""
    name = row["name"]
    if "passes" in row:
        if unknown := sorted(row.keys() - {"name", "passes"}):
            raise UsageError(
                f"{label}: {kind} {name} has passes, and {unknown[0]} beside them",
                hint='options belong to a pass: passes = [{ name = "rotate", size = 16 }]',
            )
        if steps := checked_entries(row, "passes", "a name", label):
            return tuple(_spec(step, step["name"], label) for step in steps)
    if not isinstance(row.get("pass"), str):
        raise UsageError(f"{label}: {kind} {name} names no pass", hint='pass = "quantize-blocks"')
    return (_spec({key: value for key, value in row.items() if key != "pass"}, row["pass"], label),)


def _format_row(name: str, specs: Sequence[PassSpec]) -> dict[str, Any]:
    if len(specs) == 1:
        return {"name": name, "pass": specs[0].name, **specs[0].options}
    return {"name": name, "passes": [spec.to_dict() for spec in specs]}


def _spec(row: Mapping[str, Any], name: str, label: str) -> PassSpec:
    optional = row.get("optional", False)
    if not isinstance(optional, bool):
        raise UsageError(f"{label}: optional of {name} must be true or false, not {optional!r}")
    registry.pass_class(name)
    return PassSpec(name, {key: value for key, value in row.items() if key not in _OWN_KEYS}, optional)


def _importance(table: Mapping[str, Any], label: str) -> dict[str, float]:
    if not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0 for value in table.values()
    ):
        raise UsageError(f"{label}: importance is a table of numbers from 0, by pattern of weight names")
    return {pattern: float(value) for pattern, value in table.items()}


def parse_pass(text: str) -> PassSpec:
    """A pass from the command line, `NAME[:key=value,…]`; values are TOML where they parse as such, else strings."""
    name, _, rest = text.partition(":")
    options = {}
    for item in filter(None, re.split(r",(?![^\[\]]*\])", rest)):  # commas within a list belong to it
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(
                f"--pass {text}: {item!r} is not key=value", hint="--pass quantize-blocks:bits=4,block_size=32"
            )
        options[key.strip().replace("-", "_")] = _literal(value.strip())
    registry.pass_class(name)
    optional = options.pop("optional", False)
    return PassSpec(name, options, optional=optional is True)


def from_passes(passes: Sequence[PassSpec]) -> Recipe:
    return Recipe("command line", tuple(passes))


def parameters(cls: type[Pass]) -> dict[str, inspect.Parameter]:
    """The options of a pass: its constructor's arguments, with annotations resolved."""
    hints = get_type_hints(cls.__init__)
    return {
        name: parameter.replace(annotation=hints.get(name, Any))
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _checked(owner: str, key: str, value: Any, parameter: inspect.Parameter) -> Any:
    """`value` if it is of the annotated type (an int where a float is wanted passes; "4" for 4 does not)."""
    adapter = TypeAdapter(parameter.annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        # JSON mode turns TOML's lists into the tuples, sets and enums that the annotation may ask for.
        return adapter.validate_json(TypeAdapter(Any).dump_json(value), strict=True)
    except ValidationError as error:
        wanted = inspect.formatannotation(parameter.annotation).replace("typing.", "")
        hint = f"{error.errors()[0]['msg']}; see onnxpress list passes {owner}"
        raise UsageError(f"{owner}: {key} must be {wanted}, not {value!r}", hint=hint) from error


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
