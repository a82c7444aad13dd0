"""What a page is made of: `Text`, `Table`, `Figure`, `Graph` and `Entries`, each of which renders itself.

A section is anything with a `title` and an `html()`; later parts of regraft bring their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from regraft.report.graph import Edge, Node, draw_graph
from regraft.report.markup import Markup, join, tag

_LONG = 18  # characters from which a cell of text is kept from becoming a sliver


class Section(Protocol):
    """A part of a page under its own heading."""

    @property
    def title(self) -> str: ...

    def html(self) -> Markup: ...


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text; `code` is shown below them as it is, with its line breaks."""

    title: str
    paragraphs: Sequence[str] = ()
    code: str = ""
    folded: bool = False

    def html(self) -> Markup:
        code = None
        if self.code:
            code = tag("pre", tag("code", self.code), tabindex="0", role="region", aria_label=self.title)
        body = join([*(tag("p", p) for p in self.paragraphs), code])
        return tag("details", tag("summary", "Show"), body) if self.folded else body


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: the heading.
        better: which of its numbers is marked as the best, if any.
        digits: decimals of numbers.
        percent: numbers are shares, shown times 100.
        shade: tint cells by their value, from the column's group of shaded columns.
        significant: `digits` counts significant digits, for numbers of any size.
    """

    name: str
    better: Literal["high", "low"] | None = None
    digits: int = 1
    percent: bool = False
    shade: bool = False
    significant: bool = False


@dataclass(frozen=True)
class Cell:
    """A value with what belongs to it: a 95 % interval, and a remark in small print."""

    value: float | str | None
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each column. The first column names the row. `groups` has a name per row, by which
    rows are set off; the best value of a column is taken over all rows."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | float | str | None]]
    caption: str = ""
    groups: Sequence[str] = ()

    def html(self) -> Markup:
        rows = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]
        numeric = [_numeric([row[i] for row in rows]) for i in range(len(self.columns))]
        best = [_best(column, [row[i] for row in rows]) for i, column in enumerate(self.columns)]
        low, high = self._shades(rows)
        head = tag("tr", *(_heading(c, right) for c, right in zip(self.columns, numeric, strict=True)))
        body = []
        for index, row in enumerate(rows):
            cells = [
                _cell(cell, column, i == 0, right, marked, low, high)
                for i, (cell, column, right, marked) in enumerate(zip(row, self.columns, numeric, best, strict=True))
            ]
            first = bool(self.groups) and (index == 0 or self.groups[index] != self.groups[index - 1])
            body.append(tag("tr", *cells, class_="first" if first and index else None))
        caption = tag("caption", self.title, class_="hidden")
        table = tag("table", caption, tag("thead", head), tag("tbody", *body), class_="sortable")
        box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=self.title)
        return join([box, tag("p", self.caption, class_="caption") if self.caption else None])

    def _shades(self, rows: Sequence[Sequence[Cell]]) -> tuple[float, float]:
        values = [
            row[i].value
            for row in rows
            for i, column in enumerate(self.columns)
            if column.shade and isinstance(row[i].value, (int, float))
        ]
        numbers = [float(v) for v in values if isinstance(v, (int, float))]
        return (min(numbers), max(numbers)) if numbers else (0.0, 1.0)


@dataclass(frozen=True)
class Figure:
    """A drawing (see `charts`), with a caption below it; `values` is the same as a table, folded, for those who cannot
    see the drawing or want its numbers."""

    title: str
    drawing: Markup
    caption: str = ""
    values: Table | None = None

    def html(self) -> Markup:
        caption = tag("figcaption", self.caption) if self.caption else None
        box = tag("div", self.drawing, class_="scroll", tabindex="0", role="region", aria_label=self.title)
        table = None
        if self.values is not None:
            table = tag("details", tag("summary", "As a table"), self.values.html(), class_="values")
        return tag("figure", box, caption, table)


@dataclass(frozen=True)
class Graph:
    """Where models come from: nodes in columns from left to right, edges from what was read to what was made."""

    title: str
    nodes: Sequence[Node]
    edges: Sequence[Edge]
    caption: str = ""
    legend: Sequence[tuple[str, str]] = field(default=())

    def html(self) -> Markup:
        legend = None
        if self.legend:
            entries = [tag("li", tag("span", class_=f"key {kind}"), name) for kind, name in self.legend]
            legend = tag("ul", *entries, class_="legend")
        figure = Figure(self.title, draw_graph(self.title, self.nodes, self.edges), self.caption)
        return join([legend, figure.html()])


@dataclass(frozen=True)
class Entry:
    """One thing with its facts: `facts` are name -> value; values that are `Markup` may hold links. `note` stands
    beside the name where the entry is folded; `anchor` is the id that links lead to."""

    name: str
    anchor: str
    facts: Mapping[str, str]
    note: str = ""
    kind: str = "model"


@dataclass(frozen=True)
class Entries:
    """A list of things, each folded to a line; a link to one opens it."""

    title: str
    entries: Sequence[Entry]
    caption: str = ""

    def html(self) -> Markup:
        items = []
        for one in self.entries:
            facts = [tag("div", tag("dt", name), tag("dd", value)) for name, value in one.facts.items()]
            note = tag("span", one.note, class_="note") if one.note else None
            head = tag("summary", tag("span", class_=f"key {one.kind}"), tag("b", one.name), " ", note)
            items.append(tag("details", head, tag("dl", *facts), id=one.anchor, class_="entry"))
        caption = tag("p", self.caption, class_="caption") if self.caption else None
        return join([tag("div", *items, class_="entries"), caption])


def format_value(value: float | str | None, column: Column) -> str:
    """A value as the column writes it; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not column.percent:
        return f"{value:,}"
    if column.significant:
        return f"{value * 100 if column.percent else value:.{column.digits}g}"
    return f"{value * 100 if column.percent else value:,.{column.digits}f}"


def _numeric(cells: Sequence[Cell]) -> bool:
    values = [c.value for c in cells if c.value is not None]
    return bool(values) and all(isinstance(v, (int, float)) for v in values)


def _best(column: Column, cells: Sequence[Cell]) -> str | None:
    """The best value as it is written: what looks equal is marked alike."""
    values = [float(c.value) for c in cells if isinstance(c.value, (int, float))]
    if column.better is None or len(values) < 2:
        return None
    return format_value(max(values) if column.better == "high" else min(values), column)


def _heading(column: Column, right: bool) -> Markup:
    button = tag("button", column.name, tag("span", class_="arrow", aria_hidden="true"), type="button")
    return tag("th", button, scope="col", aria_sort="none", class_="number" if right else None)


def _cell(cell: Cell, column: Column, name: bool, right: bool, best: str | None, low: float, high: float) -> Markup:
    text = format_value(cell.value, column)
    marked = best is not None and text == best
    # A long name, such as that of a sweep's member, may be broken behind its signs.
    shown = join(re.split(r"(?<=[@,/_])", text), tag("wbr")) if name else text
    content = [tag("strong", text, tag("span", " (best)", class_="hidden")) if marked else shown]
    if cell.interval is not None:
        ends = [format_value(end, column) for end in cell.interval]
        content.append(tag("small", "–".join(ends)))
    if cell.note:
        content.append(tag("small", cell.note))
    style = None
    if column.shade and isinstance(cell.value, (int, float)) and high > low:
        style = f"--share:{max(0.0, min(1.0, (cell.value - low) / (high - low))):.2f}"
    long = not right and not name and max(len(text), len(cell.note)) > _LONG
    kinds = ("number" * right, "shade" * (style is not None), "best" * marked, "long" * long)
    classes = " ".join(kind for kind in kinds if kind)
    key = cell.value if isinstance(cell.value, (int, float)) else None
    attributes = {"class_": classes or None, "style": style, "data_value": key}
    return tag("th" if name else "td", *content, scope="row" if name else None, **attributes)
