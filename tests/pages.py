"""A page with one section of every kind, for the tests of reports."""

from __future__ import annotations

from regraft.report.charts import Bar, bars, heat_map, lines, thumbnails
from regraft.report.curves import Point, curves
from regraft.report.graph import Edge, Node
from regraft.report.sections import Cell, Column, Entries, Entry, Figure, Graph, Section, Table, Text


def sections(name: str = "a name") -> list[Section]:
    table = Table(
        f"Table {name}",
        [
            Column("model"),
            Column("accuracy %", better="high", percent=True),
            Column("loss", better="low", digits=3, shade=True),
        ],
        [[name, Cell(0.5, (0.4, 0.6)), 2.0], ["b", Cell(0.75, note=name), 1.25], ["c", None, 1.25]],
        f"caption {name}",
        ["one", "two", "two"],
    )
    graph = Graph(
        "Graph",
        [
            Node("base", "base", kind="base", anchor="model:0"),
            Node("m", name, name, anchor="model:1"),
            *(Node(key, key, anchor=f"model:{i}") for i, key in enumerate("nxy", 2)),
        ],
        [Edge("base", "m"), Edge("base", "n"), *(Edge(a, b) for a in "mn" for b in "xy")],
        legend=[("base", name)],
    )
    # Every tint that a cell can have, so that their texts are checked on each.
    tints = [[i / 11 * sign for i in range(12)] for sign in (1.0, -1.0)]
    wide = [[i * j / 100 for j in range(20)] for i in range(2)]
    many = {f"series {i} with a long name": [1.0 + i, 1.1 + i] for i in range(8)}
    sweep = {name: [Point(0.1, 0.5, (0.4, 0.6)), Point(0.3, 0.7, (0.6, 0.8))], "b": [Point(0.2, 0.6)]}
    plain = Table("Values", [Column("x")], [[name]])
    return [
        Text("Text", [name, "second"], code=name, folded=True),
        table,
        Figure("Bars", bars([Bar(name, 0.5, (0.4, 0.6), "base"), Bar("b", 0.7)]), name),
        Figure("Heat", heat_map([name, "b"], ["c", "d"], [[0.1, None], [-0.5, 1.0]], title=name, low=-1)),
        Figure("Tints", heat_map([name, "b"], list("abcdefghijkl"), tints, title=name, low=-1)),
        Figure("Wide", heat_map([name, "b"], [f"layer {i}" for i in range(20)], wide, title=name)),
        Figure("Slanted", heat_map([name, "b"], ["a long name"] * 5, [[0.5] * 5] * 2, title=name)),
        Figure(
            "Lines", lines({name: [1.0, None, 3.0], "b": [2.0, 2.5, 2.0]}, ["0", "1", "2"], title="t", y_title=name)
        ),
        Figure("Many", lines(many, ["0", "1"], title=name, y_title="y")),
        Figure("Curves", curves(sweep, title=name, x_title=name, y_title=name, percent=True), name, plain),
        Figure("Images", thumbnails({name: [[0.0, 1.0], [0.5, 0.2]]}, title="t")),
        graph,
        Entries("Entries", [Entry(name, f"model:{i}", {name: name, "b": name}, name) for i in range(5)], name),
    ]
