"""Tables of passes, recipes, profiles and models, to print and for the reference pages in docs/."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from onnxpress.errors import UsageError, unknown_name
from onnxpress.progress import Progress

if TYPE_CHECKING:
    from onnxpress.optimizers.base import Pass

Row = dict[str, Any]


def rows(what: str) -> list[Row]:
    """One row per item, the same keys in each."""
    tables = {
        "passes": passes,
        "recipes": recipes,
        "profiles": profiles,
        "models": models,
        "architectures": architectures,
    }
    return tables[what]()


def details(what: str, name: str) -> Row:
    """Everything that is known of one item; a pass with its options explained, a recipe as its TOML file would hold it.

    Raises UsageError, with the nearest name, where nothing is called `name`.
    """
    tables = {"passes": pass_details, "recipes": recipe_details, "profiles": profile_details, "models": model_details}
    return tables[what](name)


def passes() -> list[Row]:
    from onnxpress.optimizers import registry

    found = []
    for name in sorted(registry.PASSES):
        row = pass_details(name)
        row["options"] = {option["name"]: signature(option) for option in row["options"]}
        found.append(row)
    return found


def pass_details(name: str) -> Row:
    """One pass; `options` has a row for each: its name, type, default (none where it must be given), explanation."""
    from onnxpress.optimizers import recipe, registry

    cls = registry.pass_class(name)
    explained = explanations(cls)
    options = []
    for key, parameter in recipe.parameters(cls).items():
        kind = re.sub(r"\b(typing|collections\.abc)\.", "", inspect.formatannotation(parameter.annotation))
        required = parameter.default is inspect.Parameter.empty
        default = {} if required else {"default": parameter.default}
        options.append({"name": key, "type": kind, **default, "explanation": explained.get(key, "")})
    does = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    return {"name": name, "exact": cls.exact, "options": options, "does": does}


def signature(option: Row) -> str:
    """Type and default of a pass's option, as Python writes them."""
    return str(option["type"]) + (f" = {option['default']!r}" if "default" in option else "")


def explanations(cls: type[Pass]) -> dict[str, str]:
    """Read what the constructor's docstring says of each option under `Args:`; `a, b: …` says it of both."""
    found: dict[str, str] = {}
    _, _, section = (inspect.getdoc(cls.__init__) or "").partition("Args:\n")
    for entry in re.split(r"\n(?= {4}\S)", re.split(r"\n(?=\S)", section)[0]):
        names, colon, text = entry.partition(":")
        if colon:
            found |= dict.fromkeys(names.replace(" ", "").split(","), " ".join(text.split()))
    return found


def recipes() -> list[Row]:
    from onnxpress.optimizers import recipe

    loaded = [recipe.load_recipe(name) for name in recipe.recipe_names()]
    return [
        {"name": item.name, "passes": [spec.name for spec in item.passes], "description": item.description}
        for item in loaded
    ]


def recipe_details(name: str) -> Row:
    from onnxpress.optimizers import recipe

    return recipe.load_recipe(name).to_dict()


def profiles() -> list[Row]:
    from onnxpress.runtime_profiles import profile

    try:
        here = profile.detect_profile().name
    except UsageError:
        here = None
    loaded = [profile.load_profile(name) for name in profile.profile_names()[1:]]
    return [
        {"name": item.name, "this machine": item.name == here, "recipes": item.recipes, "description": item.description}
        for item in loaded
    ]


def profile_details(name: str) -> Row:
    from onnxpress.runtime_profiles import profile

    return profile.load_profile(name).model_dump(exclude_none=True)


def models() -> list[Row]:
    from onnxpress.models import catalog

    return [
        {"name": entry.name, "task": entry.task, "licence": entry.licence, "description": entry.description}
        for entry in catalog.load_catalog().values()
    ]


def model_details(name: str) -> Row:
    from onnxpress.models import catalog

    entries = catalog.load_catalog()
    if name not in entries:
        raise unknown_name("model", name, entries, see="onnxpress list models")
    return entries[name].model_dump(exclude_none=True)


def architectures() -> list[Row]:
    from onnxpress.exporter import architectures as exporter

    with Progress() as progress, progress.stage(f"trying {len(exporter.architecture_names())} architectures") as update:
        rows = list(exporter.table(progress=lambda done, total, name: update(done, total)))
    return [
        {
            "architecture": row.architecture,
            "task": row.task,
            "method": row.method,
            "operators": ", ".join(row.operators),
            "traced layers": row.traced_layers,
            "not fused": row.error or "; ".join(row.not_fused.values()),
            "difference": max(row.differences.values(), default=None),
        }
        for row in rows
    ]
