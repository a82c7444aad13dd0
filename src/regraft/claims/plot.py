"""A claim's plot as a small SVG file: per figure the mean, its bootstrap interval and a dot for each seed.

The drawing brings its own background and its own colours for light and dark, so that it can be read wherever it is
shown, also beside a page that does not follow the system's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from regraft.claims.claim import Figures, Plot
from regraft.claims.verdict import values_of
from regraft.inspect.intervals import bootstrap
from regraft.report.markup import Markup, number, tag

_STYLE = """
.card{fill:#fff;stroke:#d9dfdf}.ink{fill:#1d2527}.soft{fill:#5b686b}.grid{stroke:#d9dfdf}
.whisker{stroke:#0b6e69;stroke-width:2}.mean{fill:#0b6e69}.seed{fill:#0b6e69;fill-opacity:.35}
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
.axis{font-size:12px}.group{font-weight:600}.middle{text-anchor:middle}.end{text-anchor:end}
@media (prefers-color-scheme:dark){
.card{fill:#1a2326;stroke:#344144}.ink{fill:#e6ebea}.soft{fill:#9eacad}.grid{stroke:#344144}
.whisker{stroke:#4fc0b5}.mean{fill:#4fc0b5}.seed{fill:#4fc0b5}}
"""
_WIDTH, _TALL, _TOP, _CHARACTER = 640.0, 24.0, 40.0, 7.2


def draw(plot: Plot, seeds: Mapping[str, Figures]) -> Markup:
    """The plot of a claim over its seeds; rows without a value are left out."""
    rows = [(row, values) for row in plot.rows if (values := values_of(row.figure, seeds))]
    scale = 100.0 if plot.percent else 1.0
    every = [scale * v for _, values in rows for v in values]
    ticks = _ticks(min(every, default=0.0), max(every, default=1.0))
    left = 28 + _CHARACTER * max((len(row.label) for row, _ in rows), default=0)
    across = _WIDTH - left - 84

    def place(value: float) -> str:
        return number(left + across * (value - ticks[0]) / (ticks[-1] - ticks[0]))

    shapes: list[Markup] = []
    y, group = _TOP, ""
    for row, values in rows:
        if row.group != group:
            group, y = row.group, y + _TALL
            shapes.append(tag("text", group, x="16", y=number(y + 4), class_="ink group"))
        y += _TALL
        shapes += _row(row.label, np.array(values) * scale, y, left, place)
    bottom = y + 18
    axis: list[Markup] = [tag("text", plot.title, x="16", y="24", class_="ink group")]
    for tick in ticks:
        x = place(tick)
        axis.append(tag("line", x1=x, x2=x, y1=number(_TOP), y2=number(bottom), class_="grid"))
        axis.append(tag("text", f"{tick:g}".replace("-", "−"), x=x, y=number(bottom + 16), class_="soft axis middle"))
    height = bottom + 28
    card = tag("rect", x="0.5", y="0.5", width=number(_WIDTH - 1), height=number(height - 1), rx="8", class_="card")
    box = f"0 0 {number(_WIDTH)} {number(height)}"
    size = {"width": number(_WIDTH), "height": number(height)}
    inner = [tag("title", plot.title), tag("style", Markup(_STYLE)), card, *axis, *shapes]
    return tag("svg", *inner, xmlns="http://www.w3.org/2000/svg", viewBox=box, role="img", **size)


def _row(label: str, values: np.ndarray, y: float, left: float, place: Callable[[float], str]) -> list[Markup]:
    height, middle = number(y), number(y + 4.5)
    shapes = [tag("text", label, x=number(left - 12), y=middle, class_="ink end")]
    shapes += [tag("circle", cx=place(float(v)), cy=height, r="2.5", class_="seed") for v in values]
    interval = bootstrap(len(values), lambda drawn: float(values[drawn].mean()))
    if interval is not None:
        shapes.append(tag("line", x1=place(interval[0]), x2=place(interval[1]), y1=height, y2=height, class_="whisker"))
    mean = float(values.mean())
    shapes.append(tag("circle", cx=place(mean), cy=height, r="4.5", class_="mean"))
    shapes.append(tag("text", f"{mean:.3g}".replace("-", "−"), x=number(_WIDTH - 16), y=middle, class_="ink end"))
    return shapes


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that span [low, high]."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
