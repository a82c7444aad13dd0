"""`regraft claims`: experiments, one per paper, that can fail: listed, run, and shown as a page; and their models."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.terminal import Terminal, command


class Scale(str, Enum):
    """`regraft.claims.claim.SCALES`, without its imports."""

    laptop = "laptop"
    smoke = "smoke"
    paper = "paper"


Numbers = Annotated[list[str], typer.Argument(metavar="NN", help="Numbers of claims; regraft claims list shows them.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, max=1000, help="How many seeds.")]
FirstSeed = Annotated[int, typer.Option("--first-seed", min=0, max=10**6, help="The first of them.")]
AtScale = Annotated[
    Scale,
    typer.Option(
        "--scale",
        help="laptop: minutes; smoke: seconds, nothing is judged; paper: your own models and data (--inputs).",
    ),
]
InputsFile = Annotated[
    Path | None,
    typer.Option(
        "--inputs", metavar="FILE",
        help="For --scale paper, YAML or JSON: base (a model), experts {task: model}, metric (such as accuracy), "
        "validation {task: file} and test {task: file}.",
    ),
]  # fmt: skip
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Seeds at a time, each on one core; as many as there are cores."),
]
ResultsFolder = Annotated[
    Path | None, typer.Option("--results", metavar="FOLDER", help="Where results are; results/ beside the claims.")
]
Docs = Annotated[
    Path | None, typer.Option("--docs", metavar="FOLDER", help="Where claims.md goes; docs/ beside the claims' folder.")
]

Models = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Models of the zoo; all if none is named.")]
Make = Annotated[bool, typer.Option("--make", help="Train those that the cache lacks, check them, keep the figures.")]

claims = typer.Typer(no_args_is_help=True, help="Run experiments, one per paper, that can fail.")


def list_(terminal: Terminal, results: ResultsFolder = None, as_json: opt.Json = False) -> None:
    """List the claims: what each says, and what was found."""
    from regraft.claims.find import claims as all_claims
    from regraft.claims.find import claims_folder
    from regraft.claims.results import results_of

    folder = claims_folder()
    found = all_claims(folder)
    every = [results_of(one, results or folder / "results", "laptop", any_code=True) for one in found]
    if as_json:
        facts = [
            {
                "claim": one.claim.number,
                "title": one.claim.title,
                "sentence": one.claim.sentence,
                "paper": one.claim.paper.cite(),
                "baselines": list(one.claim.baselines),
                "verdict": kept.verdict if kept.seeds else None,
                "seeds": [int(seed) for seed in kept.seeds],
            }
            for one, kept in zip(found, every, strict=True)
        ]
        terminal.json(facts)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("claim", "verdict", "seeds", "what it says", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for one, kept in zip(found, every, strict=True):
        verdict = kept.verdict if kept.seeds else "not run"
        table.add_row(one.name, verdict, str(len(kept.seeds)), Text(one.claim.sentence))
    terminal.out.print(table)


def run(
    terminal: Terminal,
    numbers: Numbers,
    seeds: Seeds = 5,
    first_seed: FirstSeed = 0,
    scale: AtScale = Scale.laptop,
    inputs: InputsFile = None,
    jobs: Jobs = None,
    results: ResultsFolder = None,
    as_json: opt.Json = False,
) -> None:
    """Run claims over some seeds and judge them. Seeds that the results have are not run again, so that a run that was
    stopped goes on."""
    from regraft.claims.find import claims as some_claims
    from regraft.claims.find import claims_folder
    from regraft.claims.paper_scale import read_inputs
    from regraft.claims.run import run_claims

    terminal.interrupted = "the seeds that are done are kept"
    folder = claims_folder()
    every = run_claims(
        some_claims(folder, numbers),
        range(first_seed, first_seed + seeds),
        results or folder / "results",
        scale=scale.value,
        inputs=read_inputs(inputs) if inputs is not None else None,
        jobs=jobs,
        say=terminal.line,
    )
    if as_json:
        terminal.json([one.to_dict() for one in every])
        return
    from regraft.cli.claims_table import show_results

    for one in every:
        show_results(terminal, one)


def table(terminal: Terminal, results: ResultsFolder = None, docs: Docs = None) -> None:
    """Write the documentation's page of claims, with a plot each, from the results."""
    from regraft.claims.find import claims as all_claims
    from regraft.claims.find import claims_folder
    from regraft.claims.page import write_page

    folder = claims_folder()
    page = write_page(all_claims(folder), results or folder / "results", docs or folder.parent / "docs")
    terminal.interrupted = f"{page} is finished"
    terminal.line(f"written: {page}")


def zoo(
    terminal: Terminal,
    names: Models = None,
    make: Make = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="With --make: how many seeds.")] = 1,
    first_seed: FirstSeed = 0,
    scale: Annotated[Scale, typer.Option("--scale", help="With --make: laptop, or smoke, which keeps no figures.")] = (
        Scale.laptop
    ),
    results: ResultsFolder = None,
    as_json: opt.Json = False,
) -> None:
    """Show the models that the claims start from: data, size, training time, and quality against a simple baseline."""
    from regraft.claims.catalogue import HEAD, catalogue, make_models, read_records, rows
    from regraft.claims.find import claims_folder

    if scale is Scale.paper:
        raise typer.BadParameter("the zoo has no models of the size of papers", param_hint="--scale")
    folder = claims_folder()
    results = results or folder / "results"
    listed = catalogue(folder, names)
    terminal.interrupted = "the models that are done are kept"
    if make:
        range_of_seeds = range(first_seed, first_seed + seeds)
        records = make_models(listed, range_of_seeds, results, scale=scale.value, say=terminal.line)
    else:
        records = read_records(results)
    records = {one.name: records.get(one.name, {}) for one in listed}
    if as_json:
        terminal.json(records)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*HEAD, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows({name: seeds for name, seeds in records.items() if seeds}):
        table.add_row(*map(Text, row))
    if table.rows:
        terminal.out.print(table)
    missing = [name for name, seeds in records.items() if not seeds]
    if missing:
        terminal.line(f"not made yet (regraft claims zoo --make): {', '.join(missing)}")


for name, function in (("list", list_), ("run", run), ("table", table), ("zoo", zoo)):
    claims.command(name)(command(function))
