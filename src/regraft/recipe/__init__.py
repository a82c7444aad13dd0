"""Recipes: a YAML file becomes typed steps, then a plan, then models on disk.

`load_recipe` and `parse_recipe` read both dialects; everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.recipe.document import EvaluateStep, MergeStep, Recipe
    from regraft.recipe.load import load_recipe, parse_recipe

_HOME = {
    "EvaluateStep": "document",
    "MergeStep": "document",
    "Recipe": "document",
    "load_recipe": "load",
    "parse_recipe": "load",
}

__all__ = ["EvaluateStep", "MergeStep", "Recipe", "load_recipe", "parse_recipe"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
