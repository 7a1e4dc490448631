"""What there is to choose from: passes, recipes, profiles, models; also the source of the reference pages in docs/."""

from __future__ import annotations

import inspect
import re
from typing import Any

from onnxpress.errors import UsageError
from onnxpress.progress import Progress

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


def passes() -> list[Row]:
    from onnxpress.optimizers import recipe, registry

    found = []
    for name in sorted(registry.PASSES):
        cls = registry.pass_class(name)
        options = {
            key: re.sub(r"\b(typing|collections\.abc)\.", "", inspect.formatannotation(parameter.annotation))
            + ("" if parameter.default is inspect.Parameter.empty else f" = {parameter.default!r}")
            for key, parameter in recipe.parameters(cls).items()
        }
        does = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        found.append({"name": name, "exact": cls.exact, "options": options, "does": does})
    return found


def recipes() -> list[Row]:
    from onnxpress.optimizers import recipe

    loaded = [recipe.load_recipe(name) for name in recipe.recipe_names()]
    return [
        {"name": item.name, "passes": [spec.name for spec in item.passes], "description": item.description}
        for item in loaded
    ]


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


def models() -> list[Row]:
    from onnxpress.models import catalog

    return [
        {"name": entry.name, "task": entry.task, "licence": entry.licence, "description": entry.description}
        for entry in catalog.load_catalog().values()
    ]


def architectures() -> list[Row]:
    from onnxpress.exporter import architectures as exporter

    with Progress() as progress, progress.stage(f"trying {len(exporter.names())} architectures") as update:
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
