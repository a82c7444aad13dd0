"""Small drawings as inline SVG: bars with intervals, heat maps and lines, in the page's own colours.

Drawn here and not by a plotting library, since a page must look right in light and dark, on a phone and on paper:
shapes take their colours from CSS classes, widths are shares of what there is, and texts stay texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regraft.report.markup import Markup, join, number, tag

CHARACTER = 8.0  # width of a character at 13 px in a wide font


@dataclass(frozen=True)
class Bar:
    """One bar: its label, value, 95 % interval, and the kind that colours it ("base", "model", "merge" or "")."""

    label: str
    value: float
    interval: tuple[float, float] | None = None
    kind: str = ""


def bars(bars: Sequence[Bar], *, low: float = 0.0, high: float = 1.0, percent: bool = True) -> Markup:
    """Horizontal bars from `low` to `high`, one row each, with the interval as a whisker."""

    def share(value: float) -> str:
        return f"{100 * max(0.0, min(1.0, (value - low) / (high - low or 1))):.2f}%"

    def text(value: float) -> str:
        return f"{100 * value:.1f}" if percent else f"{value:.3g}"

    rows = []
    for bar in bars:
        shapes = [
            tag("rect", class_="track", width="100%", height="16", y="4", rx="3"),
            tag("rect", class_=f"bar {bar.kind}".strip(), width=share(bar.value), height="16", y="4", rx="3"),
        ]
        name = f"{bar.label}: {text(bar.value)}"
        if bar.interval is not None:
            a, b = (share(end) for end in bar.interval)
            shapes += [
                tag("line", class_="whisker", x1=a, x2=b, y1="12", y2="12"),
                *(tag("line", class_="whisker", x1=x, x2=x, y1="8", y2="16") for x in (a, b)),
            ]
            name += f", 95 % interval {text(bar.interval[0])} to {text(bar.interval[1])}"
        drawing = tag("svg", *shapes, width="100%", height="24", role="img", aria_label=name)
        rows.append(
            join(
                [
                    tag("span", bar.label, class_="label", aria_hidden="true"),
                    drawing,
                    tag("span", text(bar.value), class_="value", aria_hidden="true"),
                ]
            )
        )
    return tag("div", *rows, class_="bars")


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    percent: bool = False,
    signed: bool = False,
) -> Markup:
    """Values of a matrix in tinted cells.

    Args:
        rows, columns: their names.
        values: one list per row; None leaves a cell empty.
        title: what the drawing shows, for those who do not see it.
        low, high: range of the tint. If `low` < 0 < `high`, values below zero get a second colour.
        percent: write values times 100.
        signed: write a plus before values above zero, as befits differences.
    """
    left = 12 + CHARACTER * max(map(len, rows), default=0)
    wide = max(52.0, 16 + CHARACTER * max((len(c) for c in columns), default=0))
    tall, top = 30.0, 28.0
    shapes = []
    for j, name in enumerate(columns):
        middle = number(left + (j + 0.5) * wide)
        shapes.append(tag("text", name, x=middle, y=number(top - 10), class_="middle axis"))
    for i, name in enumerate(rows):
        y = top + i * tall
        shapes.append(tag("text", name, x=number(left - 10), y=number(y + tall / 2 + 4.5), class_="end"))
        for j, value in enumerate(values[i]):
            if value is None or not math.isfinite(value):
                continue
            tint = _tint(value, low, high)
            x = left + j * wide
            box = {"x": number(x + 1), "y": number(y + 1), "width": number(wide - 2), "height": number(tall - 2)}
            kind = "cell below" if low < 0 and value < 0 else "cell"
            shapes.append(tag("rect", class_=kind, rx="4", fill_opacity=f"{tint:.2f}", **box))
            words = f"{100 * value:.1f}" if percent else f"{value:.2f}"
            words = f"+{words}" if signed and value > 0 else words.replace("-", "−")
            strong = "middle on" if tint > 0.62 else "middle"
            shapes.append(tag("text", words, x=number(x + wide / 2), y=number(y + tall / 2 + 4.5), class_=strong))
    return _svg(title, left + wide * len(columns) + 2, top + tall * len(rows) + 2, shapes)


def lines(
    series: Mapping[str, Sequence[float | None]],
    labels: Sequence[str],
    *,
    title: str,
    y_title: str,
    x_title: str = "",
    from_zero: bool = True,
) -> Markup:
    """Lines over a common row of labels, up to eight, each with its own dash and colour, and its name beside its end.

    Args:
        series: name -> values, one per label; None leaves a gap.
        labels: names of the places along the x axis.
        title, x_title, y_title: what is shown.
        from_zero: let the y axis begin at zero.
    """
    found = [v for values in series.values() for v in values if v is not None and math.isfinite(v)]
    ticks = _ticks(min([0.0, *found]) if from_zero else min(found, default=0.0), max(found, default=1.0))
    left, right, top, bottom, width, height = 56.0, 130.0, 30.0, 44.0, 680.0, 300.0
    across, down = width - left - right, height - top - bottom

    def place(i: int, value: float) -> tuple[float, float]:
        x = left + across * (i / (len(labels) - 1) if len(labels) > 1 else 0.5)
        return x, top + down * (1 - (value - ticks[0]) / ((ticks[-1] - ticks[0]) or 1))

    shapes = [tag("text", y_title, x="0", y="14", class_="axis")]
    for tick in ticks:
        y = place(0, tick)[1]
        shapes.append(tag("line", x1=number(left), x2=number(left + across), y1=number(y), y2=number(y), class_="grid"))
        shapes.append(tag("text", f"{tick:g}", x=number(left - 8), y=number(y + 4.5), class_="end axis"))
    every = max(1, math.ceil(len(labels) * CHARACTER * max(map(len, labels), default=1) / across))
    for i, label in enumerate(labels):
        if i % every == 0:
            x = number(place(i, ticks[0])[0])
            shapes.append(tag("text", label, x=x, y=number(top + down + 18), class_="middle axis"))
    shapes.append(tag("text", x_title, x=number(left + across / 2), y=number(height - 4), class_="middle axis"))
    ends = []
    for k, (name, values) in enumerate(series.items()):
        points = [place(i, v) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        shapes.append(tag("polyline", points=path, class_=f"line s{k % 8}"))
        shapes += [tag("circle", cx=number(x), cy=number(y), r="2.5", class_=f"dot s{k % 8}") for x, y in points]
        if points:
            ends.append((points[-1][1], name, k % 8))
    shapes += _names(sorted(ends), left + across + 10)
    return _svg(title, width, height, shapes)


def thumbnails(images: Mapping[str, Sequence[Sequence[float]]], *, title: str, size: float = 96.0) -> Markup:
    """Small one-channel images side by side, each with its name: rows of values from 0 (paper) to 1 (ink)."""
    shapes: list[Markup] = []
    gap = 20.0
    for k, (name, rows) in enumerate(images.items()):
        left, pixel = k * (size + gap) + 1, size / max(len(rows), 1)
        box = {"x": number(left), "y": "1", "width": number(size), "height": number(size)}
        shapes.append(tag("rect", class_="canvas", rx="3", **box))
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value > 0:
                    spot = {"x": number(left + j * pixel), "y": number(1 + i * pixel)}
                    side = {"width": number(pixel + 0.2), "height": number(pixel + 0.2)}
                    shapes.append(tag("rect", class_="ink", fill_opacity=f"{min(1.0, value):.2f}", **spot, **side))
        shapes.append(tag("text", name, x=number(left + size / 2), y=number(size + 22), class_="middle axis"))
    return _svg(title, len(images) * (size + gap) - gap + 2, size + 30, shapes, shrink=0.55)


def _names(ends: Sequence[tuple[float, str, int]], x: float) -> list[Markup]:
    """Names beside the ends of lines, moved apart where they would overlap."""
    shapes: list[Markup] = []
    last = -math.inf
    for y, name, k in ends:
        last = max(y + 4.5, last + 16)
        shapes.append(tag("text", name, x=number(x), y=number(last), class_=f"name s{k}"))
    return shapes


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that span [low, high]."""
    if high <= low:
        high = low + 1
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tint(value: float, low: float, high: float) -> float:
    share = abs(value) / max(-low, high) if low < 0 else (value - low) / ((high - low) or 1)
    return 0.06 + 0.94 * max(0.0, min(1.0, share))


def _svg(title: str, width: float, height: float, shapes: Sequence[Markup], shrink: float = 0.8) -> Markup:
    """`shrink`: down to which share of its width a drawing is made smaller before it scrolls."""
    box = f"0 0 {number(width)} {number(height)}"
    size = f"width:{number(width)}px;min-width:{number(min(width, max(300, shrink * width)))}px"
    return tag("svg", tag("title", title), *shapes, viewBox=box, style=size, role="img", class_="chart")
