"""A recipe from a file, from flags, or from a file with flags that win over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repforget.recipe import Recipe, load_recipe


def chosen_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe to run; ``flags`` that are None were not given."""
    given = {key: value for key, value in flags.items() if value is not None}
    return Recipe.default(**given) if path is None else load_recipe(path).changed(**given)


def default_folder(path: Path | None, recipe: Recipe) -> Path:
    """``runs/<name>-<digest>``: the same recipe resumes in the same folder."""
    named = path.resolve().parent.name if path and path.stem == "recipe" else path.stem if path else recipe.knowledge
    return Path("runs") / f"{Path(named).name or 'run'}-{recipe.digest[:8]}"
