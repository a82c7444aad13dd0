"""Reading a recipe file of either dialect: a top-level `merge_method` makes it mergekit's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.errors import UserError
from regraft.recipe import mergekit, own
from regraft.recipe.changes import apply_changes, dump
from regraft.recipe.document import Recipe
from regraft.recipe.fields import Field
from regraft.recipe.yaml_file import parse_documents, read_text


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
    trees = parse_documents(text, name)
    if changes and len(trees) > 1:
        what = f"the file holds {len(trees)} documents, and --set changes files of one"
        raise UserError("RG309", what, where=name, fix="change the file, or write its documents as steps of one recipe")
    if changes:
        trees = [apply_changes(trees[0], changes)]
        name, text = f"{name} with --set", dump(trees[0])
    roots = [Field(tree, name) for tree in trees]
    if all("merge_method" in root.items() for root in roots):
        return mergekit.read_recipe(roots, path=path, text=text)
    if len(roots) > 1:
        what = f"the file holds several documents; the second starts in line {trees[1].line}"
        fix = "write them as steps of one recipe, or as one file each; only mergekit's recipes may share a file"
        raise UserError("RG309", what, where=name, fix=fix)
    return own.read_recipe(roots[0], path=path, text=text)
