"""Reading a recipe file of either dialect: a top-level `merge_method` makes it mergekit's."""

from __future__ import annotations

from pathlib import Path

from regraft.recipe import mergekit, own
from regraft.recipe.document import Recipe
from regraft.recipe.fields import Field
from regraft.recipe.yaml_file import parse_yaml, read_text


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file; relative paths in it are below its folder.

    Raises:
        UserError: RG306 if the file cannot be read, else as `parse_recipe`.
    """
    path = Path(path)
    return parse_recipe(read_text(path), path=path)


def parse_recipe(text: str, *, path: Path | None = None) -> Recipe:
    """The typed form of a recipe.

    Args:
        text: YAML in regraft's own language or in mergekit's.
        path: the file that it comes from, for messages and relative paths.

    Raises:
        UserError: RG301 to RG309, each with file, line, step and key.
    """
    name = path.name if path else "recipe"
    root = Field(parse_yaml(text, name), name)
    read = mergekit.read_recipe if "merge_method" in root.items() else own.read_recipe
    return read(root, path=path, text=text)
