"""`regraft run`: every step of a recipe; what a former run has done is taken from its output folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.plan import show_plan
from regraft.cli.probe import show_probes
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal

if TYPE_CHECKING:
    from regraft.recipe.run import Evaluation

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="OUT", help="Folder for models and scores; runs/<recipe's name> if not given."),
]


def run(
    terminal: Terminal,
    recipe: opt.RecipePath,
    out: Out = None,
    assignments: opt.Assignments = [],  # noqa: B006 - typer copies it
    dry_run: opt.DryRun = False,
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
    """Do all steps of a recipe: merges, sweeps, evaluations. A second run does only what has changed."""
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
    document = opt.read_recipe(recipe, assignments)
    folder = out or Path("runs") / recipe.stem
    if dry_run or terminal.verbose:
        from regraft.recipe.plan import make_plan

        planned = make_plan(document, settings, out=folder).to_dict()
        if dry_run and as_json:
            terminal.json(planned)
        else:
            show_plan(terminal, terminal.out if dry_run else terminal.err, planned)
        if dry_run:
            return
    from regraft.recipe.run import run as run_recipe

    terminal.interrupted = f"finished steps are kept in {folder}, and a new run goes on from there"
    with TerminalProgress(terminal) as progress:
        result = run_recipe(document, folder, settings, progress)
    from regraft.report.page import write_page
    from regraft.report.run import run_sections

    page = write_page(
        result.out / "report.html", title=recipe.stem, sections=run_sections(result.evaluations, result.artefacts)
    )
    if as_json:
        artefacts = {name: str(path) for name, path in result.artefacts.items()}
        evaluations = [asdict(e) for e in result.evaluations]
        terminal.json({"out": str(result.out), "artefacts": artefacts, "evaluations": evaluations, "report": str(page)})
        return
    for name in result.artefacts:
        terminal.line(f"{name}: {result.out / name}")
    _show_scores(terminal, result.evaluations)
    show_probes(terminal, result.evaluations)
    terminal.line(f"report: {page}")


def _show_scores(terminal: Terminal, evaluations: Sequence[Evaluation]) -> None:
    """One row per model, one column per evaluating step."""
    from rich.table import Table
    from rich.text import Text

    if not evaluations:
        return
    columns = list(dict.fromkeys((e.step, e.metric) for e in evaluations))
    table = Table("model", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for step, metric in columns:
        table.add_column(Text(f"{step} ({metric})"), justify="right")
    found = {(e.model, e.step): e.score for e in evaluations}
    for model in dict.fromkeys(e.model for e in evaluations):
        cells = [_score(found.get((model, step))) for step, _ in columns]
        table.add_row(Text(model), *map(Text, cells))
    terminal.out.print(table)


def _score(score: Any) -> str:
    if score is None:
        return ""
    interval = score.get("interval")
    spread = f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
    return f"{score['value']:.4g}{spread}"
