"""Paths of this machine in texts that are to be published: each is replaced by the last part of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


class PrivatePaths:
    """`PrivatePaths(known)(text)` is the text without them.

    Args:
        known: references that occur in texts; paths with spaces are only found if they are among these.
    """

    # Not within a URL, a Hub id or a relative path; a single part after "/" is left, it may be a fraction or a regex.
    _PART = r"[^\s/\\\"'+,{}\[\]()`|]+"
    _PATH = re.compile(
        rf"(?<![\w.~\\/-])(?:file://)?(?!//)(?:~/|/{_PART}/|[A-Za-z]:[\\/])(?:{_PART}[\\/])*({_PART})[\\/]?"
    )

    def __init__(self, known: Iterable[str] = ()) -> None:
        # The pattern above stops at spaces, so known paths go first, the longest first: one may begin another.
        paths = {ref for ref in known if re.match(r"~/|/|[A-Za-z]:[\\/]", ref) and "+" not in ref}
        self._known = sorted(paths, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for known in self._known:
            text = text.replace(known, Path(known).name or "folder")
        return self._PATH.sub(r"\1", text)
