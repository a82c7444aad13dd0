"""Curves over numbers: training curves and sweeps, with an interval around each point where there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regraft.report.frame import STYLES, Frame, svg, ticks
from regraft.report.markup import Markup, number, tag

_ASIDE = 2.5
MOST_POINTS = 240  # of a curve; more is not seen at this width


@dataclass(frozen=True)
class Point:
    """A point of a curve, with the 95 % interval of `y` where one is known."""

    x: float
    y: float
    interval: tuple[float, float] | None = None


def curves(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_title: str,
    y_title: str,
    from_zero: bool = False,
    percent: bool = False,
) -> Markup:
    """Up to eight curves over a numeric axis.

    Args:
        series: name -> points; those that are not finite are left out, long curves are thinned by `thinned`.
        title, x_title, y_title: what is shown.
        from_zero: let the y axis begin at zero.
        percent: write y times 100.

    Raises:
        ValueError: for more curves than can be told apart.
    """
    if len(series) > STYLES:
        raise ValueError(f"{len(series)} curves cannot be told apart, at most {STYLES} can")
    clean = {name: thinned(finite(points)) for name, points in series.items()}
    every = [point for points in clean.values() for point in points]
    values = [v for p in every for v in (p.y, *(p.interval or ()))]
    frame = Frame.around(series, values, y_title, x_title, from_zero, percent)
    places = [p.x for p in every]
    x_ticks = ticks(min(places, default=0.0), max(places, default=1.0))
    shapes = frame.shapes()
    for tick in x_ticks:
        x = number(frame.along(tick, x_ticks))
        shapes.append(tag("text", f"{tick:.6g}", x=x, y=number(frame.bottom + 18), class_="middle axis"))
    spread = any(point.interval is not None for point in every)
    for k, (name, points) in enumerate(clean.items()):
        aside = _ASIDE * (k - (len(clean) - 1) / 2) if spread else 0.0  # or intervals at one x would hide one another
        drawn = [(frame.along(p.x, x_ticks) + aside, frame.down(p.y)) for p in points]
        for point, (x_drawn, _) in zip(points, drawn, strict=True):
            if point.interval is not None:
                low, high = (f"{frame.down(end):.1f}" for end in point.interval)
                at = f"{x_drawn:.1f}"
                shapes.append(tag("line", class_=f"spread s{k}", x1=at, x2=at, y1=low, y2=high))
        told = [f"{name}: {p.y * 100 if percent else p.y:.4g} at {p.x:.6g}" for p in points]
        shapes += frame.line(name, drawn, k, told)
    return svg(title, frame.width, frame.height, [*shapes, *frame.names()])


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that have a place."""
    return [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the first, the last, and the extremes of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = points[1:-1]
    kept = [points[0]]
    for i in range(stretches):
        part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        extremes = {id(p): p for p in (min(part, key=lambda p: p.y), max(part, key=lambda p: p.y))}
        kept += sorted(extremes.values(), key=lambda p: p.x)
    return [*kept, points[-1]]
