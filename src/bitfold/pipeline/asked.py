"""What a caller gave, in the one form that the pipeline works with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitfold.errors import RecipeError
from bitfold.recipe import Recipe

__all__ = ["resolve_recipe", "several"]


def resolve_recipe(
    recipe: Recipe | str | Path | None,
    method: str | None,
    scheme: str | None,
    set: str | Sequence[str],
    ignore: str | Sequence[str],
    seed: int | None,
    effort: str | None,
) -> Recipe:
    """A finished recipe as it is, or the one that `Recipe.make` makes of the rest.

    Raises RecipeError where both are given.
    """
    if not isinstance(recipe, Recipe):
        file = None if recipe is None else Path(recipe)
        return Recipe.make(
            method,
            scheme,
            file=file,
            set=several(set),
            ignore=several(ignore),
            seed=seed,
            effort=effort,
        )
    if method or scheme or set or ignore or effort or seed is not None:
        raise RecipeError(
            "A finished Recipe goes without method, scheme, set, ignore, seed and effort: give one or the other."
        )
    return recipe


def several(values: Any) -> Sequence[Any]:
    """One value or a sequence of them, as a sequence."""
    return [values] if isinstance(values, str | Path) else values
