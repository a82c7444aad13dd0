"""Options that several commands have, each written once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from regraft.recipe.document import Recipe
    from regraft.recipe.settings import Settings

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]i?|)b?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes of a text such as `4GB`, `512MiB` or `1.5g`; decimal units unless there is an i."""
    match = _SIZE.fullmatch(text.strip())
    number = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is no size; write 4GB, 512MB or 1.5GiB")
    return number


_RUN = "How to run"
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe of regraft's own, or a mergekit file.")]
Assignments = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe: --set steps.merged.density=0.1 (the value is YAML; may be repeated).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan; write nothing.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace an output that exists, and merge models that do not look like fine-tunes of the base.",
        rich_help_panel=_RUN,
    ),
]
AllowNan = Annotated[
    bool, typer.Option("--allow-nan", help="Merge NaN and infinity as they are.", rich_help_panel=_RUN)
]
AcceptLicenses = Annotated[
    bool,
    typer.Option(
        "--accept-licenses", help="Go on although the licences of the inputs do not agree.", rich_help_panel=_RUN
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Do not use the network, only the Hub's local cache.", rich_help_panel=_RUN)
]
Workers = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help="Threads; all cores if not given.", rich_help_panel=_RUN)
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--chunk", metavar="ELEMENTS", min=1, help="Elements per piece of work; no result depends on it.",
        rich_help_panel=_RUN,
    ),
]  # fmt: skip
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory", metavar="SIZE", parser=size, help="Stay below this much memory, such as 4GB.",
        rich_help_panel=_RUN,
    ),
]  # fmt: skip
ShardSize = Annotated[
    int,
    typer.Option(
        "--shard-size", metavar="SIZE", parser=size, help="Size of a file of the output.", rich_help_panel=_RUN
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=2**63 - 1, help="For rules that draw; replaces the recipe's.", rich_help_panel=_RUN
    ),
]
DEFAULT_SHARD: Any = "5GB"


def settings(**switches: Any) -> Settings:
    """The switches of a run, under the names of the options' parameters."""
    from regraft.recipe.settings import Settings

    switches["shard_bytes"] = switches.pop("shard_size")
    return Settings(**switches)


def read_recipe(path: Path, assignments: list[str]) -> Recipe:
    """The recipe of a file, with what --set changes."""
    from regraft.recipe import load_recipe

    return load_recipe(path, changes=assignments)
