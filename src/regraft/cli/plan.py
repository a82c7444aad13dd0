"""`regraft plan`: what a run would read, do and write, and whether it can start. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.progress import count, duration
from regraft.cli.terminal import Terminal
from regraft.cli.words import options_in_words, size_in_words, value_in_words
from regraft.recipe.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from regraft.recipe.plan import Plan

Out = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="OUT", help="Where the results would go, to check the disk.")
]


@opt.with_settings
def plan(
    terminal: Terminal,
    recipe: opt.RecipePath,
    out: Out = None,
    assignments: opt.Assignments = [],  # noqa: B006 - typer copies it
    as_json: opt.Json = False,
    *,
    settings: Settings,
) -> None:
    """Check a recipe and show what a run would do. The exit status is 0 only if it can start."""
    from regraft.recipe import load_recipe
    from regraft.recipe.plan import make_plan

    settings = opt.on_this_machine(settings)
    planned = make_plan(load_recipe(recipe, changes=assignments), settings, out=out)
    tell_plan(terminal, planned, dry_run=True, as_json=as_json)


def tell_plan(terminal: Terminal, plan: Plan, *, dry_run: bool, as_json: bool) -> None:
    """Print a plan: as the result of a dry run, for a script if `as_json`, or as a remark before a run."""
    if dry_run and as_json:
        terminal.json(plan.to_dict())
    else:
        show_plan(terminal, terminal.out if dry_run else terminal.err, plan.to_dict())


def show_plan(terminal: Terminal, console: Console, plan: Mapping[str, Any]) -> None:
    """Print what `Plan.to_dict` gives for people to read; its warnings go to stderr as notes."""
    for step in plan["steps"]:
        show = _show_evaluation if "evaluate" in step else _show_merge if "merge" in step else _show_make
        show(console, step)
    disk = f"{size_in_words(plan['disk_bytes'])} on disk"
    memory = f"about {size_in_words(plan['memory_bytes'])} of memory"
    time = f"about {duration(plan['seconds_estimated'])} for the merges"
    threads = f"{plan['workers']} workers, chunks of {count(plan['chunk_elements'])} elements"
    console.print(f"In all: {disk}, {memory}, {time}; {threads}", markup=False)
    for warning in plan["warnings"]:
        terminal.note(warning)


def _show_evaluation(console: Console, step: Mapping[str, Any]) -> None:
    console.print(f"{step['step']}: {step['evaluate']} of {', '.join(step['models'])}", markup=False, style="bold")
    console.print(f"  {value_in_words(step['options'])}", markup=False)


def _show_make(console: Console, step: Mapping[str, Any]) -> None:
    """A step that runs a model."""
    verb = next(name for name in ("compress", "train") if name in step)
    others = "".join(f", {role} {name}" for role, name in step["models"].items() if role != "model")
    console.print(f"{step['step']}: {step[verb]} of {step['models']['model']}{others}", markup=False, style="bold")
    data = f"data {step['data']}, " if step["data"] else ""
    console.print(f"  {data}licence {step['licence'] or 'unknown'}", markup=False)
    chosen = {name: value for name, value in step["options"].items() if value is not None}
    console.print(f"  {value_in_words(chosen)}", markup=False)


def _show_merge(console: Console, step: Mapping[str, Any]) -> None:
    from regraft.recipe.vocabulary_report import sentences

    base = f" on {step['base']}" if step["base"] else ""
    title = f"{step['step']}: {step['merge']} of {', '.join(step['models'])}{base}"
    console.print(title, markup=False, style="bold")
    lines = [
        f"{step['tensors']} tensors, {count(step['parameters'])} parameters, {', '.join(step['dtypes'])}",
        f"reads {size_in_words(step['bytes_read'])}, writes {size_in_words(step['bytes_written'])}",
        f"configuration of {step['config_from']}, licence {step['licence'] or 'unknown'}, seed {step['seed']}",
    ]
    if step["config_changes"]:
        lines.append(f"configuration changes: {value_in_words(step['config_changes'])}")
    if step["vocabulary"]:
        lines += sentences(step["vocabulary"])
    for line in lines:
        console.print(f"  {line}", markup=False)
    _show_values(console, step)


def _show_values(console: Console, step: Mapping[str, Any]) -> None:
    """The resolved options: once what is the same for all tensors, then a row for each run of equal ones."""
    from rich.table import Table
    from rich.text import Text

    from regraft.merge.rule import per_model_fields
    from regraft.methods import method

    per_model = per_model_fields(method("merge", step["merge"]).options)
    merged = [row["options"] for row in step["values"] if row["options"] is not None]
    shared = {k: v for k, v in merged[0].items() if all(other[k] == v for other in merged)} if merged else {}
    if shared:
        console.print(f"  all tensors: {options_in_words(shared, step['models'], per_model)}", markup=False)
    if len(step["values"]) == 1 and len(shared) == len(merged[0] if merged else {}):
        return
    table = Table("layers", "tensors", "from", "to", "values", box=None, padding=(0, 2), pad_edge=True)
    for row in step["values"]:
        own = {k: v for k, v in (row["options"] or {}).items() if k not in shared}
        values = "copied" if row["options"] is None else options_in_words(own, step["models"], per_model)
        last = row["last"] if row["last"] != row["first"] else ""
        table.add_row(*map(Text, (_layers(row), str(row["tensors"]), row["first"], last, values)))
    console.print(table)


def _layers(row: Mapping[str, Any]) -> str:
    ends = [str(row[key]) for key in ("first_layer", "last_layer") if row[key] is not None]
    return "-".join(dict.fromkeys(ends))
