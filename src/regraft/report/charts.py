"""Small drawings as inline SVG: bars with intervals, heat maps and lines, in the page's own colours.

Drawn here and not by a plotting library, since a page must look right in light and dark, on a phone and on paper:
shapes take their colours from CSS classes, widths are shares of what there is, and texts stay texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regraft.report.frame import CHARACTER, Frame, drawable, svg
from regraft.report.markup import Markup, join, number, tag

_WIDE = 16  # columns of a heat map that still leave room for values
_LONGEST = 28  # characters of a name beside a heat map


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
    form: str = ".2f",
) -> Markup:
    """Values of a matrix in tinted cells.

    Args:
        rows, columns: their names.
        values: one list per row; None leaves a cell empty.
        title: what the drawing shows, for those who do not see it.
        low, high: range of the tint. If `low` < 0 < `high`, values below zero get a second colour.
        percent: write values times 100.
        signed: write a plus before values above zero, as befits differences.
        form: how values are written that are no percentages.

    More than `_WIDE` columns are drawn without their values, which stay in the cells' titles.
    """
    rows, columns = [_short(name) for name in rows], [_short(name) for name in columns]
    longest = max(map(len, columns), default=0)
    compact = len(columns) > _WIDE
    slanted = not compact and longest > 7 and len(columns) > 3
    left = 12 + CHARACTER * max(map(len, rows), default=0)
    wide = 24.0 if compact else 58.0 if slanted else max(52.0, 16 + CHARACTER * longest)
    tall = 24.0 if compact else 30.0
    top = 18 + 0.6 * CHARACTER * longest if slanted else 28.0
    every = max(1, math.ceil((CHARACTER * longest + 6) / wide)) if compact else 1
    shapes = []
    for j, name in enumerate(columns):
        x, y = number(left + (j + 0.5) * wide), number(top - 10)
        if slanted:
            shapes.append(tag("text", name, x=x, y=y, class_="axis", transform=f"rotate(-40 {x} {y})"))
        elif j % every == 0:
            shapes.append(tag("text", name, x=x, y=y, class_="middle axis"))
    for i, name in enumerate(rows):
        y_row = top + i * tall
        shapes.append(tag("text", name, x=number(left - 10), y=number(y_row + tall / 2 + 4.5), class_="end"))
        for j, value in enumerate(values[i]):
            if value is None or not math.isfinite(value):
                continue
            tint = _tint(value, low, high)
            x_cell = left + j * wide
            box = {"x": number(x_cell + 1), "y": number(y_row + 1), "width": number(wide - 2)}
            kind = "cell below" if low < 0 and value < 0 else "cell"
            words = f"{100 * value:.1f}" if percent else f"{value:{form}}"
            if float(words) == 0:
                words = words.lstrip("-")  # no minus before what rounds to zero
            words = f"+{words}" if signed and value > 0 else words.replace("-", "−")
            told = tag("title", f"{name}, {columns[j]}: {words}")
            # How deep the deepest tint may be, for texts to stand out, depends on the colours: see page.css.
            share = f"--tint-share:{tint:.2f}"
            shapes.append(tag("rect", told, class_=kind, rx="4", style=share, height=number(tall - 2), **box))
            if not compact:
                at = {"x": number(x_cell + wide / 2), "y": number(y_row + tall / 2 + 4.5)}
                shapes.append(tag("text", words, class_="middle", **at))
    right = 0.77 * CHARACTER * len(columns[-1]) if slanted else 0.0
    return svg(title, left + wide * len(columns) + 2 + max(0.0, right - wide / 2), top + tall * len(rows) + 2, shapes)


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
    frame = Frame.around(series, [v for values in series.values() for v in values], y_title, x_title, from_zero)
    shapes = frame.shapes()
    for i, x in frame.thinned(labels):
        shapes.append(tag("text", labels[i], x=number(x), y=number(frame.bottom + 18), class_="middle axis"))
    for k, (name, values) in enumerate(series.items()):
        points = [(frame.across(i, len(labels)), frame.down(v)) for i, v in enumerate(values) if drawable(v)]
        shapes += frame.line(name, points, k)
    return svg(title, frame.width, frame.height, [*shapes, *frame.names()])


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
    return svg(title, len(images) * (size + gap) - gap + 2, size + 30, shapes, shrink=0.55)


def _tint(value: float, low: float, high: float) -> float:
    share = abs(value) / max(-low, high) if low < 0 else (value - low) / ((high - low) or 1)
    return 0.06 + 0.94 * max(0.0, min(1.0, share))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
