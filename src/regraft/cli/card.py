"""`regraft card`: what a model card lacks or gets wrong, and how two cards differ."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.terminal import Terminal, command

if TYPE_CHECKING:
    from regraft.inspect.card_diff import CardDiff
    from regraft.inspect.card_lint import CardReport, Finding

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id; its README.md is the card.")]
First = Annotated[str, typer.Argument(metavar="A", help="A folder or a Hub id.")]
Second = Annotated[str, typer.Argument(metavar="B", help="Another one.")]
Fix = Annotated[
    bool, typer.Option("--fix", help="Enter what the files tell into the card; nothing that is there is changed.")
]
Ignore = Annotated[
    list[str], typer.Option("--ignore", metavar="RULE", help="Do not look for this, such as missing-language.")
]
Offline = opt.Offline

card = typer.Typer(no_args_is_help=True, help="Check model cards against the files beside them, and compare cards.")


def lint(
    terminal: Terminal,
    model: Model,
    fix: Fix = False,
    ignore: Ignore = [],  # noqa: B006 - typer copies it
    as_json: opt.Json = False,
    offline: Offline = False,
) -> None:
    """List what a card does not state, and what it states that the files contradict. Exit status 1 if there is
    anything to mend, 0 if there is nothing."""
    from regraft.inspect.card_fix import fix as enter
    from regraft.inspect.card_lint import check_ignored
    from regraft.inspect.card_lint import lint as look
    from regraft.inspect.facts import open_or_shell

    check_ignored(ignore)
    opened = open_or_shell(model, offline=offline)
    found = look(opened)
    before, entered = found.score, []
    if fix:
        entered = enter(opened, found, ignore)
        if entered:
            found = look(open_or_shell(model, offline=offline))
    left = [one for one in found.findings if one.rule not in ignore]
    if as_json:
        told = found.to_dict() | {"findings": [vars(one) for one in left]}
        terminal.json(told | ({"fixed": [vars(one) for one in entered], "score_before": before} if fix else {}))
    else:
        _show_findings(terminal, found, left, entered)
    if left:
        raise typer.Exit(1)


def diff(terminal: Terminal, a: First, b: Second, as_json: opt.Json = False, offline: Offline = False) -> None:
    """Show how two cards differ, field by field and section by section. Exit status 1 if they do, 0 if not."""
    from regraft.inspect.card_diff import diff as compare
    from regraft.inspect.facts import open_or_shell

    found = compare(open_or_shell(a, offline=offline), open_or_shell(b, offline=offline))
    if as_json:
        terminal.json(found.to_dict())
    else:
        _show_diff(terminal, found)
    if not found.same:
        raise typer.Exit(1)


def _show_findings(terminal: Terminal, found: CardReport, left: list[Finding], entered: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = terminal.out
    for one in entered:
        console.print(f"entered {one.field}: {_words(one.value)} (from {one.source})", markup=False)
    if left:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
        for one in left:
            told = one.message
            if one.value is not None:
                told += f"; --fix enters {_words(one.value)} (from {one.source})"
            table.add_row(Text(one.rule, style="bold"), Text(told))
        console.print(table)
    stated = f"{len(found.stated)} of {len(found.wanted)} fields stated ({found.score:.0%})"
    mend = f"{len(left)} to mend" if left else "nothing to mend"
    console.print(f"{found.model}: {stated}, {mend}", markup=False)


def _show_diff(terminal: Terminal, found: CardDiff) -> None:
    from rich.table import Table
    from rich.text import Text

    console = terminal.out
    for remark in found.remarks:
        terminal.note(remark)
    if found.fields:
        table = Table("field", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for name in (found.a, found.b):
            table.add_column(Text(name), overflow="fold")
        for one in found.fields:
            table.add_row(Text(one.field, style="bold"), Text(_words(one.a)), Text(_words(one.b)))
        console.print(table)
    for section in found.sections:
        kind = section.kind.replace("in a", f"in {found.a}").replace("in b", f"in {found.b}")
        console.print(f"\n{section.heading or 'text above the first heading'}: {kind}", markup=False, style="bold")
        for line in section.lines:
            console.print(f"  {line}", markup=False)
    if found.same:
        console.print("the cards say the same", markup=False)


def _words(value: Any, most: int = 80) -> str:
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 1] + "…"


for function in (lint, diff):
    card.command()(command(function))
