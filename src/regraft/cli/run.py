"""`regraft run`: every step of a recipe; what a former run has done is taken from its output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.plan import tell_plan
from regraft.cli.probe import show_probes
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal
from regraft.recipe.settings import Settings
from regraft.train import processes

if TYPE_CHECKING:
    from regraft.recipe.scores import Evaluation

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="OUT", help="Folder for models and scores; runs/<recipe's name> if not given."),
]


@opt.with_settings
def run(
    terminal: Terminal,
    recipe: opt.RecipePath,
    out: Out = None,
    assignments: opt.Assignments = [],  # noqa: B006 - typer copies it
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    *,
    settings: Settings,
) -> None:
    """Do all steps of a recipe: merges, sweeps, evaluations. A second run does only what has changed."""
    from regraft.recipe.stamp import Stamp
    from regraft.recipe.yaml_file import read_text

    text = read_text(recipe)
    folder = out or Path("runs") / recipe.stem
    if processes.rank() > 0:
        _take_part(text, recipe, folder, assignments, settings)
        return
    stamp = Stamp("run", recipe, text, assignments, folder, settings)
    if not (dry_run or terminal.verbose or processes.count() > 1) and (told := stamp.result()) is not None:
        terminal.repeat(told["notes"])
        for name in told["results"]["artefacts"]:
            terminal.line(f"{name}: done before")
        _show(terminal, told["results"], as_json)
        return
    from regraft.recipe import parse_recipe

    settings = opt.on_this_machine(settings)
    document = parse_recipe(text, path=recipe, changes=assignments)
    stamp.watch(document)
    if dry_run or terminal.verbose:
        from regraft.recipe.plan import make_plan

        tell_plan(terminal, make_plan(document, settings, out=folder), dry_run=dry_run, as_json=as_json)
        if dry_run:
            return
    from regraft.recipe.run import run as run_recipe

    terminal.interrupted = f"finished steps are kept in {folder}, and a new run goes on from there"
    with TerminalProgress(terminal) as progress:
        result = run_recipe(document, folder, settings, progress)
    from regraft.report.folder import collect
    from regraft.report.run import write_report

    found = collect(result.out, result.artefacts, result.evaluations)
    page = write_report(found, result.out / "report.html", title=recipe.stem)
    results = {
        "out": str(result.out),
        "artefacts": {name: str(path) for name, path in result.artefacts.items()},
        "evaluations": [asdict(e) for e in result.evaluations],
        "report": str(page),
    }
    terminal.unless_stamped(stamp.keep({"notes": terminal.notes, "results": results}))
    _show(terminal, results, as_json)


def _take_part(text: str, recipe: Path, folder: Path, assignments: Sequence[str], settings: Settings) -> None:
    """What a process does that was launched beside the first one: its share of trainings, and nothing is said."""
    from regraft.recipe import parse_recipe
    from regraft.recipe.run import run as run_recipe

    run_recipe(parse_recipe(text, path=recipe, changes=assignments), folder, opt.on_this_machine(settings))


def _show(terminal: Terminal, results: Mapping[str, Any], as_json: bool) -> None:
    """What came out: for a script what `results` holds, else lines and tables."""
    if as_json:
        terminal.json(results)
        return
    for name in results["artefacts"]:
        terminal.line(f"{name}: {Path(results['out']) / name}")
    if results["evaluations"]:
        from regraft.recipe.scores import Evaluation

        evaluations = [Evaluation(**e) for e in results["evaluations"]]
        _show_scores(terminal, evaluations)
        show_probes(terminal, evaluations)
    terminal.line(f"report: {results['report']}")


def _show_scores(terminal: Terminal, evaluations: Sequence[Evaluation]) -> None:
    """One row per model, one column per evaluating step."""
    from rich.table import Table
    from rich.text import Text

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
