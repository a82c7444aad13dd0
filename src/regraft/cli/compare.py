"""`regraft compare`: what `regraft inspect` tells of several models, with the base found where their files name it."""

from __future__ import annotations

from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.inspect import Base, Page, Stats, examine, show
from regraft.cli.terminal import Terminal
from regraft.errors import UserError

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="Two or more folders, files or Hub ids; @revision and +adapter may follow."),
]


def compare(
    terminal: Terminal,
    models: Models,
    base: Base = None,
    out: Page = None,
    stats: Stats = False,
    as_json: opt.Json = False,
    offline: opt.Offline = False,
) -> None:
    """Compare models: facts, differences, what can combine them, and what each changed in the base. The base is
    --base, or the one of them that the cards and records of all others name."""
    if len(models) + (base is not None) < 2:
        raise UserError("RG305", "there is nothing to compare with", fix="name two or more models")
    found = examine(terminal, models, base, stats=stats, offline=offline, find_base=True)
    if found.changes is None:
        terminal.note("no base is named by --base or by the models' files, so what they changed was not measured")
    show(terminal, found, out, as_json=as_json)
