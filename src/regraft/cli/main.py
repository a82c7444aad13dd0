"""The command `regraft`: parse, call the library, print. Nothing here imports torch or a model library.

Each command is a file of `regraft.cli`; its function imports what it needs when it runs, so that `regraft --help` and
shell completion answer at once.
"""

from __future__ import annotations

import io
import sys
from importlib import metadata
from typing import Annotated

import typer

from regraft.cli.card import card
from regraft.cli.claims import claims
from regraft.cli.compare import compare
from regraft.cli.delta import delta
from regraft.cli.extract_lora import extract_lora
from regraft.cli.flips import flips
from regraft.cli.inspect import inspect
from regraft.cli.lean import collect_seldom, import_later, leave_at_once
from regraft.cli.making import compress, export, train
from regraft.cli.merge import merge
from regraft.cli.methods import methods
from regraft.cli.plan import plan
from regraft.cli.report import report
from regraft.cli.run import run
from regraft.cli.schema import schema
from regraft.cli.signals import die_at_once
from regraft.cli.terminal import Debug, Quiet, Terminal, Verbose, command
from regraft.version import __version__

app = typer.Typer(
    name="regraft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (
    merge,
    run,
    plan,
    compress,
    train,
    export,
    inspect,
    compare,
    flips,
    report,
    extract_lora,
    methods,
    schema,
):
    app.command()(command(function))
app.add_typer(delta, name="delta")
app.add_typer(card, name="card")
app.add_typer(claims, name="claims")


def _print_versions(wanted: bool) -> None:
    if wanted:
        others = ", ".join(f"{package} {_version(package)}" for package in ("torch", "transformers"))
        typer.echo(f"regraft {__version__} ({others})")
        raise typer.Exit


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _regraft(
    context: typer.Context,
    verbose: Verbose = False,
    quiet: Quiet = False,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_versions, help="Show versions and exit.")
    ] = False,
) -> None:
    """Reuse pre-trained models instead of training from scratch: merge real checkpoints by recipe, with evidence."""
    context.obj = Terminal(verbose, quiet, debug)


def main() -> None:
    """The command `regraft`, for callers that go on after it: ends with SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to fail
    try:
        app(prog_name="regraft")
    finally:
        # Threads of a run that was stopped may still have to end; no traceback then if somebody is impatient.
        die_at_once()


def process() -> None:
    """`main` for a process that has nothing else to do afterwards: it ends at once."""
    collect_seldom()
    import_later("torch")
    leave_with = leave_at_once()
    try:
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            leave_with(end.code or 0)
        raise
