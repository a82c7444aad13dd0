"""A page with one section of every kind, for the tests of reports."""

from __future__ import annotations

from regraft.report.charts import Bar, bars, heat_map, lines, thumbnails
from regraft.report.graph import Edge, Node
from regraft.report.sections import Cell, Column, Figure, Graph, Section, Table, Text


def sections(name: str = "a name") -> list[Section]:
    table = Table(
        f"Table {name}",
        [Column("model"), Column("accuracy %", better="high", percent=True), Column("loss", better="low", digits=3)],
        [[name, Cell(0.5, (0.4, 0.6)), 2.0], ["b", Cell(0.75, note=name), 1.25], ["c", None, 1.25]],
        f"caption {name}",
        ["one", "two", "two"],
    )
    graph = Graph(
        "Graph",
        [Node("base", "base", kind="base"), Node("m", name, name), Node("n", "n"), Node("x", "x"), Node("y", "y")],
        [Edge("base", "m"), Edge("base", "n"), *(Edge(a, b) for a in "mn" for b in "xy")],
        legend=[("base", name)],
    )
    return [
        Text("Text", [name, "second"], code=name, folded=True),
        table,
        Figure("Bars", bars([Bar(name, 0.5, (0.4, 0.6), "base"), Bar("b", 0.7)]), name),
        Figure("Heat", heat_map([name, "b"], ["c", "d"], [[0.1, None], [-0.5, 1.0]], title=name, low=-1)),
        Figure(
            "Lines", lines({name: [1.0, None, 3.0], "b": [2.0, 2.5, 2.0]}, ["0", "1", "2"], title="t", y_title=name)
        ),
        Figure("Images", thumbnails({name: [[0.0, 1.0], [0.5, 0.2]]}, title="t")),
        graph,
    ]
