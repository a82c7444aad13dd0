"""`regraft schema`: the JSON schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from regraft.cli.terminal import Terminal


class Dialect(str, Enum):
    """Languages of recipes."""

    regraft = "regraft"
    mergekit = "mergekit"
    both = "both"


def schema(
    terminal: Terminal,
    dialect: Annotated[Dialect, typer.Option("--dialect", help="Which recipes the schema is for.")] = Dialect.regraft,
) -> None:
    """Print the JSON schema (draft 2020-12) of recipes."""
    from regraft.recipe.schema import schema as make_schema

    terminal.json(make_schema(dialect.value))
