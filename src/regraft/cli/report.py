"""`regraft report`: the page of a run, and a bundle of it for somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.terminal import Terminal
from regraft.inspect.words import size_in_words

Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="The folder of a run, of a model that regraft made, or of a training."),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Where to write the page; RUN/report.html if not given."),
]
Title = Annotated[str, typer.Option("--title", metavar="TEXT", help="Heading of the page; the folder's name.")]
Bundle = Annotated[
    Path | None,
    typer.Option(
        "--bundle", metavar="ZIP", help="Also pack page, recipe, records, scores and logs, without weights or paths."
    ),
]


def report(
    terminal: Terminal,
    folder: Run,
    out: Out = None,
    title: Title = "",
    bundle: Bundle = None,
    as_json: opt.Json = False,
) -> None:
    """Write a page with everything that a run left: lineage, scores, curves, cost. Weights are not read."""
    from regraft.report.bundle import write_bundle
    from regraft.report.folder import read_run
    from regraft.report.run import write_report

    found = read_run(folder)
    page = write_report(found, out or folder / "report.html", title=title)
    terminal.interrupted = f"{page} is finished"
    for remark in found.remarks:
        terminal.note(remark)
    packed = write_bundle(found, bundle) if bundle is not None else []
    if as_json:
        told = {"report": str(page), "models": list(found.artefacts), "evaluations": len(found.evaluations)}
        terminal.json(told | ({"bundle": str(bundle), "files": packed} if bundle is not None else {}))
        return
    terminal.out.print(f"{page}: {size_in_words(page.stat().st_size)}", markup=False)
    if bundle is not None:
        size = size_in_words(bundle.stat().st_size)
        terminal.out.print(f"{bundle}: {size}, {len(packed)} files", markup=False)
