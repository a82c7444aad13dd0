"""One self-contained HTML page: no network, no fonts or scripts from elsewhere, readable in light and dark, on a phone,
on paper and by keyboard. A Content-Security-Policy in the page itself forbids every request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from regraft.errors import UserError
from regraft.report.markup import Markup, join, tag
from regraft.report.sections import Section
from regraft.version import __version__

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def write_page(
    path: Path,
    *,
    title: str,
    sections: Sequence[Section],
    summary: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a page.

    Args:
        path: the file; its folder must exist. A file that is there is replaced at once, never half.
        title: the heading.
        sections: what the page shows, in order; each gets an entry in the contents.
        summary: paragraphs below the heading: what was found.
        facts: short name -> value pairs below them, such as versions and times.

    Raises:
        UserError: RG405 if the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(render(title, sections, summary=summary, facts=facts or {}), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        what = f"the report cannot be written: {error.strerror}"
        raise UserError("RG405", what, where=str(path), fix="name a folder that exists and can be written") from None
    return path


def render(
    title: str, sections: Sequence[Section], *, summary: Sequence[str] = (), facts: Mapping[str, str] | None = None
) -> str:
    """The page as text; see `write_page`."""
    anchors = _anchors([s.title for s in sections])
    contents = [tag("li", tag("a", s.title, href=f"#{a}")) for s, a in zip(sections, anchors, strict=True)]
    body = [
        tag("a", "Skip to the results", href="#results", class_="skip"),
        tag(
            "header",
            tag("h1", title),
            *(tag("p", paragraph, class_="lead") for paragraph in summary),
            _facts(facts or {}),
            tag("nav", tag("ul", *contents), aria_label="Contents") if len(sections) > 1 else None,
        ),
        tag(
            "main",
            *(
                tag("section", tag("h2", s.title, id=f"{a}-title"), s.html(), id=a, aria_labelledby=f"{a}-title")
                for s, a in zip(sections, anchors, strict=True)
            ),
            id="results",
        ),
        tag("footer", tag("p", f"Written by regraft {__version__}. This page is complete in itself.")),
        tag("script", _asset("page.js")),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="generator", content=f"regraft {__version__}"),
        tag("title", title),
        tag("style", _asset("page.css")),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _facts(facts: Mapping[str, str]) -> Markup | None:
    if not facts:
        return None
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()), class_="facts")


def _anchors(titles: Sequence[str]) -> list[str]:
    anchors: list[str] = []
    for title in titles:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        anchor, n = stem, 2
        while anchor in anchors or anchor == "results":
            anchor, n = f"{stem}-{n}", n + 1
        anchors.append(anchor)
    return anchors


def _asset(name: str) -> Markup:
    """A file of the package, as it is: style and script are not escaped in HTML."""
    return join([Markup(resources.files("regraft.report").joinpath(name).read_text(encoding="utf-8"))])
