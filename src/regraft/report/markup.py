"""HTML and SVG by function calls, so that nothing gets into a page unescaped.

Texts are escaped unless they are `Markup`, and only `tag` and `join` make `Markup` out of other values.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

VOID = {"br", "meta", "wbr"}
_SHAPES = {"path", "rect", "line", "circle", "polyline"}  # closed at once if nothing is inside


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """A value as HTML text; `Markup` stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[Any], separator: str = "") -> Markup:
    """Several values one after the other."""
    return Markup(escape(separator).join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element: `tag("a", "text", href="#x", class_="link", aria_label="y")`.

    Attributes lose a trailing underscore and other underscores become hyphens; None and False leave an attribute out,
    True writes it without a value. Children that are None are left out.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        written.append(f" {attribute}" if value is True else f' {attribute}="{escape(value)}"')
    opening = f"<{name}{''.join(written)}>"
    if name in VOID:
        return Markup(opening)
    if name in _SHAPES and all(child is None for child in children):
        return Markup(opening[:-1] + "/>")
    return Markup(f"{opening}{join(children)}</{name}>")


def number(value: float) -> str:
    """A coordinate: at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
