"""Which recipe is run: the one named, the one that limits ask for, or the target's own; requests that contradict."""

from __future__ import annotations

from dataclasses import replace

from onnxpress.artifact.artifact import Artifact
from onnxpress.build.gates import Gates
from onnxpress.errors import UsageError
from onnxpress.models.catalog import load_catalog
from onnxpress.optimizers import recipe as recipes
from onnxpress.optimizers.recipe import PassSpec, Recipe
from onnxpress.runtime_profiles.profile import Profile
from onnxpress.search.options import SearchOptions

BUDGET, BUDGET_STORED, STRUCTURE = "budget", "budget-stored", "budget-structure"
"""The recipes that are searched where limits are given and no recipe: for weights in general, and for those that were
quantized before."""
FUSE_FOREIGN = "fuse-foreign"
"""The pass that brings graphs of others to the form that structural passes take."""
FEW_BITS = 8.0
"""A checkpoint with fewer bits a weight was quantized: what its file holds is the best of its own size."""


def checked(recipe: Recipe, target: Profile) -> Recipe:
    """`recipe` with every `auto` resolved; a wrong option shows here, before the long work."""
    recipe = recipe.resolve(target.auto)
    recipe.build()
    return recipe


def check_search(recipe: Recipe | None, gates: Gates | None, options: SearchOptions | None) -> None:
    """Raise UsageError for a search without limits, and for a search's options without a search."""
    limited = gates is not None and gates != Gates()
    if recipe is not None and recipe.searched and not limited:
        raise UsageError(
            f"recipe {recipe.name} chooses formats and cuts within limits, and none is given",
            hint="such as --max-loss 1%",
        )
    searched = recipe.searched if recipe is not None else limited
    if not searched and options is not None and options != SearchOptions():
        raise UsageError(
            "--minimize, --kernel-table and --target-size are for a search, and nothing is searched",
            hint="give a limit, such as --max-loss 1%, and no recipe but one with formats or cuts",
        )


def default_recipe(
    model: str, artifact: Artifact, target: Profile, gates: Gates | None, options: SearchOptions | None
) -> Recipe:
    """What is run where no recipe is named: with limits, a search for the cuts and formats that meet them."""
    if gates is not None and gates != Gates():
        structure = gates.max_parameters is not None or (options is not None and options.structure)
        return recipes.load_recipe(STRUCTURE if structure else budget(artifact)).resolve(target.auto)
    entry = load_catalog().get(model)
    name = entry.recipe_for(target.name) if entry else None
    return recipes.load_recipe(name or target.recipe_for(artifact.task)).resolve(target.auto)


def with_our_operators(recipe: Recipe, artifact: Artifact) -> Recipe:
    """`recipe`, begun with `fuse-foreign` where a pass of it edits the transformer in a graph that others made."""
    foreign = artifact.export.get("method") == "foreign" and not artifact.history
    wanted = bool(recipe.cuts) or any(one.needs_anatomy for one in recipe.build())
    if not foreign or not wanted or any(spec.name == FUSE_FOREIGN for spec in recipe.passes):
        return recipe
    return replace(recipe, passes=(PassSpec(FUSE_FOREIGN, optional=True), *recipe.passes))


def budget(artifact: Artifact) -> str:
    """The name of the recipe that is searched over formats for such weights."""
    return BUDGET_STORED if artifact.export.get("stored_bits", 32.0) < FEW_BITS else BUDGET
