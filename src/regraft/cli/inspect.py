"""`regraft inspect`: what a model is; of several, whether they can be merged and how much they differ."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.comparison_table import show_comparison
from regraft.cli.delta_tables import show_deltas
from regraft.cli.facts_table import show_facts
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal

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
Stats = Annotated[bool, typer.Option("--stats", help="Read all weights: NaN, infinity, all-zero tensors, norms.")]


def inspect(
    terminal: Terminal,
    models: Models,
    base: Base = None,
    stats: Stats = False,
    as_json: opt.Json = False,
    offline: opt.Offline = False,
) -> None:
    """Show what a model is; of several, whether and how they can be merged. Without --stats and --base, weights
    are not read."""
    from regraft.checkpoint import open_checkpoint
    from regraft.inspect.compare import compare
    from regraft.inspect.deltas import deltas
    from regraft.inspect.facts import facts, look

    with TerminalProgress(terminal) as progress:
        if len(models) == 1 and base is None:
            found = [look(models[0], stats=stats, offline=offline)]
            comparison, changes = None, None
        else:
            opened = [open_checkpoint(reference, offline=offline) for reference in models]
            origin = open_checkpoint(base, offline=offline) if base is not None else None
            found = []
            for one in [*([origin] if origin is not None else []), *opened]:
                progress.step(f"reading {one.ref}")
                found.append(facts(one, stats=stats, on_progress=progress.advance))
            comparison = compare(opened, base=origin) if len(opened) > 1 else None
            changes = None
            if origin is not None:
                progress.step("measuring what changed")
                changes = deltas(origin, opened, on_progress=progress.advance)
    if as_json:
        data: dict[str, Any] = {"models": [one.to_dict() for one in found]}
        if comparison is not None:
            data["comparison"] = {k: v for k, v in comparison.to_dict().items() if k != "facts"}
        if changes is not None:
            data["deltas"] = changes.to_dict()
        terminal.json(data)
        return
    show_facts(terminal, found)
    if comparison is not None:
        show_comparison(terminal, comparison)
    if changes is not None:
        show_deltas(terminal, changes.to_dict())
