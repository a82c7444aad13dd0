"""`regraft inspect`: what a model is; of several, whether they can be merged and how much they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.comparison_table import show_comparison
from regraft.cli.delta_tables import show_deltas
from regraft.cli.facts_table import show_facts
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal

if TYPE_CHECKING:
    from regraft.inspect.compare import Comparison
    from regraft.inspect.deltas import Deltas
    from regraft.inspect.facts import Facts

Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="A folder, a file, or a Hub id; @revision, +adapter and +delta may follow."),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base", metavar="MODEL", help="The model that the others come from: read all weights, measure what changed."
    ),
]
Page = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write what was found as a page, in HTML.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Read all weights: NaN, infinity, all-zero tensors, norms.")]


@dataclass(frozen=True)
class Examined:
    """What was found of models: the facts of all, base first; how they compare, what they changed."""

    facts: list[Facts]
    comparison: Comparison | None = None
    changes: Deltas | None = None


def inspect(
    terminal: Terminal,
    models: Models,
    base: Base = None,
    out: Page = None,
    stats: Stats = False,
    as_json: opt.Json = False,
    offline: opt.Offline = False,
) -> None:
    """Show what a model is; of several, whether and how they can be merged. Without --stats and --base, weights
    are not read."""
    show(terminal, examine(terminal, models, base, stats=stats, offline=offline), out, as_json=as_json)


def examine(
    terminal: Terminal,
    models: list[str],
    base: str | None,
    *,
    stats: bool = False,
    offline: bool = False,
    find_base: bool = False,
) -> Examined:
    """Look at models; with `find_base`, the base may be one of them, if the files of all others say so."""
    from regraft.checkpoint import open_checkpoint
    from regraft.inspect.compare import compare
    from regraft.inspect.deltas import deltas
    from regraft.inspect.facts import facts, look
    from regraft.inspect.origin import stated_base

    with TerminalProgress(terminal) as progress:
        if len(models) == 1 and base is None:
            return Examined([look(models[0], stats=stats, offline=offline)])
        opened = [open_checkpoint(reference, offline=offline) for reference in models]
        origin = open_checkpoint(base, offline=offline) if base is not None else None
        if origin is None and find_base and (found := stated_base(opened)) is not None:
            origin = opened.pop(found)
        known = []
        for one in [*([origin] if origin is not None else []), *opened]:
            progress.step(f"reading {one.ref}")
            known.append(facts(one, stats=stats, on_progress=progress.advance))
        own = known[len(known) - len(opened) :]
        comparison = compare(opened, base=origin, known=own) if len(opened) > 1 else None
        changes = None
        if origin is not None:
            progress.step("measuring what changed")
            changes = deltas(origin, opened, on_progress=progress.advance)
    return Examined(known, comparison, changes)


def show(terminal: Terminal, found: Examined, out: Path | None, *, as_json: bool) -> None:
    """Print what was found, and write it as a page if one is wanted."""
    page = None
    if out is not None:
        from regraft.report.models import write_comparison

        page = write_comparison(out, found.facts, found.comparison, found.changes)
    if as_json:
        data: dict[str, Any] = {"models": [one.to_dict() for one in found.facts]}
        if found.comparison is not None:
            data["comparison"] = {k: v for k, v in found.comparison.to_dict().items() if k != "facts"}
        if found.changes is not None:
            data["deltas"] = found.changes.to_dict()
        if page is not None:
            data["report"] = str(page)
        terminal.json(data)
        return
    show_facts(terminal, found.facts)
    if found.comparison is not None:
        show_comparison(terminal, found.comparison)
    if found.changes is not None:
        show_deltas(terminal, found.changes.to_dict())
    if page is not None:
        terminal.line(f"report: {page}")
