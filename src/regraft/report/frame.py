"""The frame of line charts: axes with round numbers, lines told apart without colour, names beside their ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from regraft.report.markup import Markup, number, tag

CHARACTER = 8.0  # width of a character at 13 px in a wide font
STYLES = 8  # lines that can be told apart
_DOTS = 40  # points of a line that are marked one by one
_LONGEST = 26  # characters of a name beside a line


def drawable(value: float | None) -> bool:
    """Whether a value has a place in a drawing."""
    return value is not None and math.isfinite(value)


@dataclass
class Frame:
    """The space of a chart, from its ticks: where values go, and what stands around them."""

    y_ticks: Sequence[float]
    y_title: str
    x_title: str
    right: float
    left: float = 60.0
    top: float = 30.0
    width: float = 720.0
    height: float = 310.0
    percent: bool = False
    _ends: list[tuple[float, str, int]] = field(default_factory=list)

    @classmethod
    def around(
        cls,
        names: Collection[str],
        values: Iterable[float | None],
        y_title: str,
        x_title: str,
        from_zero: bool,
        percent: bool = False,
    ) -> Frame:
        """A frame that holds all values, with room for the names beside the lines."""
        found = [v for v in values if v is not None and math.isfinite(v)]
        low, high = min(found, default=0.0), max(found, default=1.0)
        room = 20 + CHARACTER * min(_LONGEST, max(map(len, names), default=0))
        return cls(ticks(min(0.0, low) if from_zero else low, high), y_title, x_title, max(48.0, room), percent=percent)

    @property
    def bottom(self) -> float:
        return self.height - 44.0

    @property
    def inner(self) -> float:
        """Width of the space for lines."""
        return self.width - self.left - self.right

    def across(self, i: float, count: int) -> float:
        """x of place number `i` of `count`."""
        return self.left + self.inner * (i / (count - 1) if count > 1 else 0.5)

    def along(self, value: float, x_ticks: Sequence[float]) -> float:
        """x of a value on a numeric axis."""
        return self.left + self.inner * (value - x_ticks[0]) / ((x_ticks[-1] - x_ticks[0]) or 1)

    def down(self, value: float | None) -> float:
        """y of a value."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.top + (self.bottom - self.top) * (1 - ((value or 0.0) - low) / ((high - low) or 1))

    def shapes(self) -> list[Markup]:
        """The titles of the axes, and the lines of the grid with their numbers."""
        shapes = [tag("text", self.y_title, x="0", y="14", class_="axis")]
        for tick in self.y_ticks:
            y, right = number(self.down(tick)), number(self.left + self.inner)
            shapes.append(tag("line", x1=number(self.left), x2=right, y1=y, y2=y, class_="grid"))
            at = {"x": number(self.left - 8), "y": number(self.down(tick) + 4.5)}
            shapes.append(tag("text", f"{100 * tick if self.percent else tick:.6g}", class_="end axis", **at))
        middle = number(self.left + self.inner / 2)
        return [*shapes, tag("text", self.x_title, x=middle, y=number(self.height - 4), class_="middle axis")]

    def thinned(self, labels: Sequence[str]) -> Iterator[tuple[int, float]]:
        """(number, x) of the labels that there is room for."""
        longest = max(map(len, labels), default=1)
        every = max(1, math.ceil(len(labels) * CHARACTER * longest / self.inner))
        for i in range(0, len(labels), every):
            yield i, self.across(i, len(labels))

    def line(self, name: str, points: Sequence[tuple[float, float]], k: int, told: Sequence[str] = ()) -> list[Markup]:
        """A line in the k-th style through points of the drawing; `told` are the titles of its dots."""
        style = f"s{k % STYLES}"
        shapes = [tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"line {style}")]
        if len(points) <= _DOTS:
            for i, (x, y) in enumerate(points):
                title = tag("title", told[i]) if told else None
                shapes.append(tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", class_=f"dot {style}"))
        if points:
            short = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
            self._ends.append((points[-1][1], short, k % STYLES))
        return shapes

    def names(self) -> list[Markup]:
        """Names beside the ends of the lines, moved apart where they would overlap."""
        ends = sorted(self._ends)
        places: list[float] = []
        for y, _, _ in ends:
            places.append(max(y + 4.5, places[-1] + 16 if places else -math.inf))
        over = max(0.0, places[-1] - (self.bottom + 4)) if places else 0.0
        for i in range(len(places) - 1, -1, -1):  # pushed below the frame: up again
            ceiling = places[i + 1] - 16 if i + 1 < len(places) else places[i] - over
            places[i] = min(places[i], ceiling)
        x = number(self.left + self.inner + 10)
        return [
            tag("text", name, x=x, y=number(place), class_=f"name s{k}")
            for place, (_, name, k) in zip(places, ends, strict=True)
        ]


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that span [low, high]."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def svg(title: str, width: float, height: float, shapes: Sequence[Markup], shrink: float = 0.8) -> Markup:
    """A drawing; `shrink`: down to which share of its width it is made smaller before it scrolls."""
    box = f"0 0 {number(width)} {number(height)}"
    size = f"width:{number(width)}px;min-width:{number(min(width, max(300, shrink * width)))}px"
    return tag("svg", tag("title", title), *shapes, viewBox=box, style=size, role="img", class_="chart")
