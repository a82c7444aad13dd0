"""The text of a model card, by its headings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from regraft.checkpoint import Checkpoint
from regraft.inspect.card import card_text

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n.*?^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t#]*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True)
class Section:
    """A heading ("" for what stands above the first one) and the text below it, up to the next heading."""

    heading: str
    text: str


def sections(checkpoint: Checkpoint) -> list[Section]:
    """The parts of a card in order; a heading within a block of code is none."""
    found: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in _FRONT.sub("", card_text(checkpoint), count=1).splitlines():
        mark = _FENCE.match(line)
        if mark and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else mark[1]
        heading = None if fence or mark else _HEADING.fullmatch(line)
        if heading:
            found.append((heading[2], []))
        else:
            found[-1][1].append(line)
    parts = [Section(heading, "\n".join(lines).strip()) for heading, lines in found]
    return [part for part in parts if part.heading or part.text]
