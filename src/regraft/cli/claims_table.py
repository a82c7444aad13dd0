"""What a claim has found, in the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from regraft.claims.results import Results
from regraft.cli.terminal import Terminal


def show_results(terminal: Terminal, results: Results) -> None:
    """The verdict, each check with its effect and interval, and the mean of each figure of the plot."""
    claim = results.claim
    heading = f"{claim.number:02d} {claim.title}: {results.verdict} ({len(results.seeds)} seeds)"
    terminal.out.print(heading, markup=False, style="bold")
    terminal.out.print(claim.sentence, markup=False)
    if results.findings:
        table = Table(
            "check", "effect", "95 % interval", "needed", "found", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for one in results.findings:
            unit = 100 if one.percent else 1
            ends = " to ".join(f"{unit * end:+.3g}" for end in one.interval) if one.interval else "—"
            says = one.says if one.decides else f"{one.says} (does not decide)"
            table.add_row(Text(says), f"{unit * one.mean:+.3g}", ends, f"{unit * one.least:.3g}", one.verdict)
        terminal.out.print(table)
    figures = list(results.figures.values())
    for row in claim.plot.rows:
        values = [one[row.figure] for one in figures if row.figure in one]
        if values:
            name = f"{row.group}, {row.label}" if row.group else row.label
            unit = 100 if claim.plot.percent else 1
            terminal.out.print(f"  {name}: {unit * sum(values) / len(values):.3g}", markup=False)
    terminal.out.print()
