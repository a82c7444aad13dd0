"""A graph of models as inline SVG, in columns from left to right.

A model's column is one more than that of the last model it was made from; within a column, models stand near those that
they were made from, so that few lines cross. Models made from the same ones share a joint, so that nine merges of four
experts draw 4 + 9 lines and not 36. A box may be a link to what the page tells of its model; the keyboard goes through
such boxes in the order in which models were made, and the page's script sets off what belongs to the box in focus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regraft.report.markup import Markup, join, number, tag

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 236.0, 46.0, 64.0, 12.0, 4.0
_SWEEPS = 4  # there and back over the columns; more changes little


@dataclass(frozen=True)
class Node:
    """A model: `key` names it in edges; `label` and `detail` (method, options, digest) are shown; `kind` is "base",
    "model" or "merge"; `anchor` is the id of the element that tells more of it, "" if there is none."""

    key: str
    label: str
    detail: str = ""
    kind: str = "model"
    anchor: str = ""


@dataclass(frozen=True)
class Edge:
    """`source` was read to make `target`."""

    source: str
    target: str


def draw_graph(title: str, nodes: Sequence[Node], edges: Sequence[Edge]) -> Markup:
    """The graph as an SVG element.

    Raises:
        ValueError: if an edge names no node, or the edges form a circle.
    """
    parents: dict[str, list[str]] = {node.key: [] for node in nodes}
    for edge in edges:
        if edge.source not in parents or edge.target not in parents:
            raise ValueError(f"the edge {edge.source} -> {edge.target} names a model that is not in the graph")
        parents[edge.target].append(edge.source)
    columns = _ordered(_columns(parents), parents)
    places = _places(columns)
    numbers = {node.key: i for i, node in enumerate(nodes)}
    count = max(map(len, columns), default=0)
    height = 2 * MARGIN + count * (HEIGHT + GAP_Y) - GAP_Y
    width = 2 * MARGIN + len(columns) * (WIDTH + GAP_X) - GAP_X
    by_key = {node.key: node for node in nodes}
    shapes = _lines(parents, places, numbers)
    shapes += [
        _box(by_key[key], *places[key], numbers[key], [by_key[p].label for p in dict.fromkeys(parents[key])])
        for column in columns
        for key in column
    ]
    box = f"0 0 {number(width)} {number(height)}"
    style = f"width:{number(width)}px;min-width:{number(0.8 * width)}px"
    linked = any(node.anchor for node in nodes)
    # What has links inside is no image to a screen reader, or it would keep them to itself.
    return tag(
        "svg",
        tag("title", title),
        *shapes,
        viewBox=box,
        style=style,
        role="group" if linked else "img",
        aria_label=title,
        class_="chart graph",
    )


def _columns(parents: Mapping[str, Sequence[str]]) -> list[list[str]]:
    depth: dict[str, int] = {}
    waiting = list(parents)
    while waiting:
        ready = [key for key in waiting if all(p in depth for p in parents[key])]
        if not ready:
            raise ValueError(f"the models {', '.join(waiting)} were made from one another")
        depth |= {key: 1 + max((depth[p] for p in parents[key]), default=-1) for key in ready}
        waiting = [key for key in waiting if key not in depth]
    columns: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for key in parents:
        columns[depth[key]].append(key)
    return columns


def _ordered(columns: list[list[str]], parents: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Columns whose models stand at about the mean place of their neighbours; equal means keep their order."""
    children: dict[str, list[str]] = {key: [] for key in parents}
    for key, own in parents.items():
        for parent in own:
            children[parent].append(key)
    place = {key: (i + 0.5) / len(column) for column in columns for i, key in enumerate(column)}
    for sweep in range(_SWEEPS):
        forth = sweep % 2 == 0
        neighbours: Mapping[str, Sequence[str]] = parents if forth else children
        for column in columns if forth else reversed(columns):
            means = {k: sum(place[n] for n in neighbours[k]) / len(neighbours[k]) for k in column if neighbours[k]}
            column.sort(key=lambda key: means.get(key, place[key]))
            place |= {key: (i + 0.5) / len(column) for i, key in enumerate(column)}
    return columns


def _places(columns: Sequence[Sequence[str]]) -> dict[str, tuple[float, float]]:
    """Top left corner of each box; columns are centred."""
    tallest = max(map(len, columns), default=0) * (HEIGHT + GAP_Y)
    places = {}
    for i, column in enumerate(columns):
        top = MARGIN + (tallest - len(column) * (HEIGHT + GAP_Y)) / 2
        for j, key in enumerate(column):
            places[key] = (MARGIN + i * (WIDTH + GAP_X), top + j * (HEIGHT + GAP_Y))
    return places


def _lines(
    parents: Mapping[str, Sequence[str]], places: Mapping[str, tuple[float, float]], numbers: Mapping[str, int]
) -> list[Markup]:
    families: dict[tuple[str, ...], list[str]] = {}
    for key, own in parents.items():
        if own:
            families.setdefault(tuple(sorted(set(own))), []).append(key)
    shapes = []
    for family, children in families.items():
        starts = {p: (places[p][0] + WIDTH, places[p][1] + HEIGHT / 2) for p in family}
        ends = {c: (places[c][0], places[c][1] + HEIGHT / 2) for c in children}
        above, below = (" ".join(str(numbers[k]) for k in keys) for keys in (family, children))
        if len(starts) > 1 and len(ends) > 1:
            joint = (min(x for x, _ in ends.values()) - GAP_X / 2, sum(y for _, y in ends.values()) / len(ends))
            shapes += [_curve(start, joint, str(numbers[p]), below) for p, start in starts.items()]
            shapes += [_curve(joint, end, above, str(numbers[c])) for c, end in ends.items()]
            shapes.append(tag("circle", cx=number(joint[0]), cy=number(joint[1]), r="4", class_="joint"))
        else:
            for p, start in starts.items():
                shapes += [_curve(start, end, str(numbers[p]), str(numbers[c])) for c, end in ends.items()]
    return shapes


def _curve(start: tuple[float, float], end: tuple[float, float], above: str, below: str) -> Markup:
    """A line; `above` and `below` are the numbers of the models that it joins, for the page's script."""
    (x1, y1), (x2, y2) = start, end
    bend = max(20.0, min(GAP_X, x2 - x1) / 2)
    path = f"M{number(x1)} {number(y1)}C{number(x1 + bend)} {number(y1)} {number(x2 - bend)} {number(y2)} "
    return tag("path", d=path + f"{number(x2)} {number(y2)}", class_="edge", data_from=above, data_to=below)


def _box(node: Node, x: float, y: float, index: int, made_from: Sequence[str]) -> Markup:
    full = " · ".join(part for part in (node.label, node.detail) if part)
    body = [
        tag("title", full),
        tag("rect", x=number(x), y=number(y), width=number(WIDTH), height=number(HEIGHT), rx="8", class_="box"),
        tag("text", _short(node.label, 26), x=number(x + 12), y=number(y + 20), class_="label"),
        tag("text", _short(node.detail, 30), x=number(x + 12), y=number(y + 36), class_="small"),
    ]
    told = full + (f", made from {', '.join(made_from)}" if made_from else "")
    inside = tag("a", *body, href=f"#{node.anchor}", aria_label=told) if node.anchor else join(body)
    return tag("g", inside, class_=f"node {node.kind}", data_node=index)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
