"""Reading a recipe file of either dialect: a top-level `merge_method` makes it mergekit's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.recipe import mergekit, own
from regraft.recipe.changes import apply_changes, dump
from regraft.recipe.document import Recipe
from regraft.recipe.fields import Field
from regraft.recipe.yaml_file import parse_yaml, read_text


def load_recipe(path: Path | str, *, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; relative paths in it are below its folder. `changes` as for `parse_recipe`.

    Raises:
        UserError: RG306 if the file cannot be read, else as `parse_recipe`.
    """
    path = Path(path)
    return parse_recipe(read_text(path), path=path, changes=changes)


def parse_recipe(text: str, *, path: Path | None = None, changes: Sequence[str] = ()) -> Recipe:
    """The typed form of a recipe.

    Args:
        text: YAML in regraft's own language or in mergekit's.
        path: the file that it comes from, for messages and relative paths.
        changes: texts such as `steps.merged.density=0.1`, made before the recipe is read; its text is then the new one.

    Raises:
        UserError: RG301 to RG309, each with file, line, step and key.
    """
    name = path.name if path else "recipe"
    tree = parse_yaml(text, name)
    if changes:
        tree = apply_changes(tree, changes)
        name, text = f"{name} with --set", dump(tree)
    root = Field(tree, name)
    read = mergekit.read_recipe if "merge_method" in root.items() else own.read_recipe
    return read(root, path=path, text=text)
