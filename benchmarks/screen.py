"""What is seen while a benchmark runs: the table as it grows and what is being done; plain lines off a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from tables import Columns, Row, cells

WIDTH = 160  # where there is no terminal to fit


class Screen:
    """A context in which rows are added; the finished table stays on the terminal."""

    def __init__(self, columns: Columns, *, title: str) -> None:
        self._columns = columns
        self._console = Console()
        if not self._console.is_terminal:
            self._console.width = WIDTH
        self._table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for number, (name, _) in enumerate(columns):
            self._table.add_column(name, justify="right" if number else "left")
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._told = ""

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._table)
            self._live.__exit__(kind, error, trace)
        else:
            self._console.print(self._table)

    def doing(self, what: str) -> None:
        """Say what is being done now."""
        if self._live is not None:
            self._live.update(Group(self._table, Spinner("dots", Text(what))))
        else:
            self.say(what)

    def making(self, what: str, share: float) -> None:
        """Say how far something has come; off a terminal only that it has begun."""
        if self._live is not None:
            self.doing(f"{what}: {share:.0%}")
        elif what != self._told:
            self.doing(what)
        self._told = what if share < 1 else ""

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False)

    def row(self, row: Row) -> None:
        self._table.add_row(*(Text(cell) for cell in cells(self._columns, row)))
