"""`regraft inspect`: what a model is; of several, whether they can be merged and how much they differ."""

from __future__ import annotations

from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.terminal import Terminal

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="A folder, a file, or a Hub id; @revision and +adapter may follow."),
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="The model that the others were fine-tuned from.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Read all weights: NaN, infinity, all-zero tensors, norms.")]


def inspect(
    terminal: Terminal,
    models: Models,
    base: Base = None,
    stats: Stats = False,
    as_json: opt.Json = False,
    offline: opt.Offline = False,
) -> None:
    """Show what a model is; of several models, whether and how they can be merged."""
    raise typer.Exit(1)
