"""The facts of one or more models as one table: a row for each fact, a column for each model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from regraft.cli.terminal import Terminal
from regraft.inspect.words import FACTS, short_names
from regraft.inspect.words import listed as listed

if TYPE_CHECKING:
    from regraft.inspect.facts import Facts


def show_facts(terminal: Terminal, models: Sequence[Facts]) -> None:
    """Print the table, then contradictions and remarks, which are part of the result."""
    from rich.table import Table
    from rich.text import Text

    names = short_names([facts.ref for facts in models])
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=len(models) > 1)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    if len(models) == 1:
        terminal.out.print(models[0].ref, markup=False, style="bold")
    for title, read in FACTS.items():
        cells = [read(facts) for facts in models]
        if any(cell is not None for cell in cells):
            table.add_row(Text(title, style="bold"), *(Text(cell or "") for cell in cells))
    terminal.out.print(table)
    for name, facts in zip(names, models, strict=True):
        prefix = f"{name}: " if len(models) > 1 else ""
        for against in facts.contradictions:
            line = f"{prefix}contradiction in {against.subject}: {against.card}; {against.found}"
            terminal.out.print(line, markup=False)
        for remark in facts.remarks:
            terminal.out.print(f"{prefix}{remark}", markup=False)
