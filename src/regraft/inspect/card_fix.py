"""Entering into a card what the files tell: only values that `lint` has derived, and nothing that is there is touched.

Lines are added at the end of the front matter; what the author wrote, comments included, stays as it is to the byte. An
empty entry of a field that is filled goes, since a key may stand only once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.licences import on_hub
from regraft.errors import UserError
from regraft.inspect.card_lint import CardReport, Finding

_FRONT = re.compile(r"\A(\ufeff?---[ \t]*\r?\n)(.*?)(^---[ \t]*\r?$)", re.DOTALL | re.MULTILINE)
_EMPTY = r"""^{}[ \t]*:[ \t]*(?:~|null|\[[ \t]*\]|\{{[ \t]*\}}|''|"")?[ \t]*(?:#[^\r\n]*)?\r?\n(?![ \t-])"""


def fix(checkpoint: Checkpoint, report: CardReport, ignore: Sequence[str] = ()) -> list[Finding]:
    """Fill what can be filled; the findings that are mended thereby, none if the card was left as it is.

    Raises:
        UserError: RG405 if the card cannot be written, as that of a model in the Hub's cache.
    """
    derived = [one for one in report.findings if one.value is not None and one.rule not in ignore]
    unreadable = any(one.rule == "front-matter" and _FRONT.match(_read(checkpoint)) for one in report.findings)
    if not derived or unreadable:
        return []
    if checkpoint.repo_id:
        what = "the card of a model from the Hub is not changed in the cache"
        raise UserError("RG405", what, where=checkpoint.repo_id, fix="download the model into a folder, and name that")
    text = filled(_read(checkpoint), derived, name=report.model)
    path = checkpoint.path / "README.md"
    part = path.with_name(".README.md.part")
    try:
        part.write_bytes(text.encode())
        part.replace(path)
    except OSError as error:
        what = f"the card cannot be written: {error.strerror}"
        raise UserError("RG405", what, where=str(path), fix="make the folder writable") from None
    return derived


def filled(text: str, derived: Sequence[Finding], *, name: str) -> str:
    """The card with the derived values in its front matter; a card that is empty gets a title."""
    values: dict[str, Any] = {}
    for one in derived:
        if one.field == "license" and not on_hub(str(one.value)):
            values |= {"license": "other", "license_name": one.value}
        else:
            values[one.field] = one.value
    added = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)
    found = _FRONT.match(text)
    if not found:
        return f"---\n{added}---\n\n{text.lstrip() or f'# {name}' + chr(10)}"
    ends = "\r\n" if "\r\n" in found[1] else "\n"
    head = found[2]
    for key in values:
        head = re.sub(_EMPTY.format(re.escape(key)), "", head + "\x00", flags=re.MULTILINE).removesuffix("\x00")
    return found[1] + head + added.replace("\n", ends) + text[found.start(3) :]


def _read(checkpoint: Checkpoint) -> str:
    path: Path | None = checkpoint.files.get("README.md")
    return "" if path is None else path.read_bytes().decode("utf-8", errors="surrogateescape")
