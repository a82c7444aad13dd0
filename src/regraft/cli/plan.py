"""`regraft plan`: what a run would read, do and write, and whether it can start. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.progress import count, duration
from regraft.cli.terminal import Terminal
from regraft.cli.words import options_in_words, size_in_words, value_in_words

Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="OUT", help="Where the results would go, to check the disk.")
]


def plan(
    terminal: Terminal,
    recipe: opt.RecipePath,
    out: Out = None,
    assignments: opt.Assignments = [],  # noqa: B006 - typer copies it
    as_json: opt.Json = False,
    force: opt.Force = False,
    allow_nan: opt.AllowNan = False,
    accept_licenses: opt.AcceptLicenses = False,
    offline: opt.Offline = False,
    workers: opt.Workers = None,
    chunk: opt.Chunk = None,
    max_memory: opt.MaxMemory = None,
    shard_size: opt.ShardSize = opt.DEFAULT_SHARD,
    seed: opt.Seed = None,
) -> None:
    """Check a recipe and show what a run would do. The exit status is 0 only if it can start."""
    from regraft.recipe.plan import make_plan

    settings = opt.settings(
        force=force,
        allow_nan=allow_nan,
        accept_licenses=accept_licenses,
        offline=offline,
        workers=workers,
        chunk=chunk,
        max_memory=max_memory,
        shard_size=shard_size,
        seed=seed,
    )
    planned = make_plan(opt.read_recipe(recipe, assignments), settings, out=out)
    show_plan(terminal, planned.to_dict(), as_json=as_json)


def show_plan(terminal: Terminal, plan: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what `Plan.to_dict` gives, for a script or for people."""
    if as_json:
        terminal.json(plan)
        return
    for step in plan["steps"]:
        _show_evaluation(terminal, step) if "evaluate" in step else _show_merge(terminal, step)
    disk = f"{size_in_words(plan['disk_bytes'])} on disk"
    memory = f"{size_in_words(plan['memory_bytes'])} of memory at most"
    time = f"about {duration(plan['seconds_estimated'])} for the merges"
    threads = f"{plan['workers']} workers, chunks of {count(plan['chunk_elements'])} elements"
    terminal.out.print(f"In all: {disk}, {memory}, {time}; {threads}", markup=False)
    for warning in plan["warnings"]:
        terminal.note(warning)


def _show_evaluation(terminal: Terminal, step: Mapping[str, Any]) -> None:
    terminal.out.print(f"{step['step']}: {step['evaluate']} of {', '.join(step['models'])}", markup=False, style="bold")
    terminal.out.print(f"  {value_in_words(step['options'])}", markup=False)


def _show_merge(terminal: Terminal, step: Mapping[str, Any]) -> None:
    from rich.table import Table

    from regraft.merge.rule import per_model_fields
    from regraft.methods import method

    base = f" on {step['base']}" if step["base"] else ""
    title = f"{step['step']}: {step['merge']} of {', '.join(step['models'])}{base}"
    terminal.out.print(title, markup=False, style="bold")
    sizes = f"{step['tensors']} tensors, {count(step['parameters'])} parameters, {', '.join(step['dtypes'])}"
    flow = f"reads {size_in_words(step['bytes_read'])}, writes {size_in_words(step['bytes_written'])}"
    origin = f"configuration of {step['config_from']}, licence {step['licence'] or 'unknown'}, seed {step['seed']}"
    for line in (sizes, flow, origin):
        terminal.out.print(f"  {line}", markup=False)
    if step["config_changes"]:
        terminal.out.print(f"  configuration changes: {value_in_words(step['config_changes'])}", markup=False)
    table = Table("layers", "tensors", "from", "to", "values", box=None, padding=(0, 2), pad_edge=True)
    per_model = per_model_fields(method("merge", step["merge"]).options)
    for row in step["values"]:
        values = "copied" if row["options"] is None else options_in_words(row["options"], step["models"], per_model)
        last = row["last"] if row["last"] != row["first"] else ""
        table.add_row(*map(_plain, (_layers(row), str(row["tensors"]), row["first"], last, values)))
    terminal.out.print(table)


def _layers(row: Mapping[str, Any]) -> str:
    ends = [str(row[key]) for key in ("first_layer", "last_layer") if row[key] is not None]
    return "-".join(dict.fromkeys(ends))


def _plain(text: str) -> Any:
    """A text for a table that is not read as rich's markup."""
    from rich.text import Text

    return Text(text)
