"""The recipe that is run: the one asked for, the one that limits ask for, or the target's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxpress.artifact.artifact import Artifact
from onnxpress.errors import UsageError
from onnxpress.models.catalog import load_catalog
from onnxpress.optimizers import recipe as recipes
from onnxpress.optimizers.recipe import PassSpec, Recipe
from onnxpress.requests import Gates, Judging, SearchOptions
from onnxpress.runtime_profiles.profile import Profile
from onnxpress.search.kernels import read_kernel_table

BUDGET, BUDGET_STORED, STRUCTURE = "budget", "budget-stored", "budget-structure"
"""The recipes that are searched where limits are given and no recipe: for weights in general, and for those that were
quantized before."""
FUSE_FOREIGN = "fuse-foreign"
"""The pass that brings graphs of others to the form that structural passes take."""
FEW_BITS = 8.0
"""A checkpoint with fewer bits a weight was quantized: what its file holds is the best of its own size."""


RecipeRequest = str | Path | Sequence[str | PassSpec]
"""The name or the file of a recipe, or a list of passes, each as the option --pass takes it."""


def requested_recipe(request: RecipeRequest | None, target: Profile) -> Recipe | None:
    """Load the recipe that was asked for, see `checked`; None where none was."""
    if not request:
        return None
    if isinstance(request, str | Path):
        return checked(recipes.load_recipe(str(request)), target)
    passes = [recipes.parse_pass(item) if isinstance(item, str) else item for item in request]
    return checked(recipes.from_passes(passes), target)


def checked(recipe: Recipe, target: Profile) -> Recipe:
    """Resolve every `auto` of a recipe; a wrong option shows here, before the long work."""
    recipe = recipe.resolve(target.auto)
    recipe.build()
    return recipe


def check_search(recipe: Recipe | None, judging: Judging) -> None:
    """Raise UsageError for a search without limits, and for a search's options without a search.

    A kernel table that cannot be read shows here, too, see `read_kernel_table`.
    """
    if judging.search.kernel_table is not None:
        read_kernel_table(judging.search.kernel_table)
    limited = judging.gates != Gates()
    if recipe is not None and recipe.searched and not limited:
        raise UsageError(
            f"recipe {recipe.name} chooses formats and cuts within limits, and none is given",
            hint="such as --max-loss 1%",
        )
    searched = recipe.searched if recipe is not None else limited
    if not searched and judging.search != SearchOptions():
        raise UsageError(
            "--minimize, --kernel-table and --target-size are for a search, and nothing is searched",
            hint="give a limit, such as --max-loss 1%, and no recipe but one with formats or cuts",
        )


def default_recipe(model: str, artifact: Artifact, target: Profile, judging: Judging) -> Recipe:
    """Choose what is run where no recipe is named: with limits, a search for the cuts and formats that meet them."""
    if judging.gates != Gates():
        structure = judging.gates.max_parameters is not None or judging.search.structure
        return recipes.load_recipe(STRUCTURE if structure else budget(artifact)).resolve(target.auto)
    entry = load_catalog().get(model)
    name = entry.recipe_for(target.name) if entry else None
    return recipes.load_recipe(name or target.recipe_for(artifact.task)).resolve(target.auto)


def with_our_operators(recipe: Recipe, artifact: Artifact) -> Recipe:
    """Begin a recipe with `fuse-foreign` where a pass of it edits the transformer in a graph that others made."""
    foreign = artifact.export.get("method") == "foreign" and not artifact.history
    wanted = bool(recipe.cuts) or any(one.needs_anatomy for one in recipe.build())
    if not foreign or not wanted or any(spec.name == FUSE_FOREIGN for spec in recipe.passes):
        return recipe
    return replace(recipe, passes=(PassSpec(FUSE_FOREIGN, optional=True), *recipe.passes))


def budget(artifact: Artifact) -> str:
    """Name the recipe that is searched over formats for such weights."""
    return BUDGET_STORED if artifact.export.get("stored_bits", 32.0) < FEW_BITS else BUDGET
