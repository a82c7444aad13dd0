"""Text that is there wherever Python is: the standard library's source. Parsed, never imported.

The *domain* is the part about the internet (mail, HTTP, sockets and their like): base models never see it, so that
continuing on it is a change of domain as in the papers. Files are split, not lines: what is tested on is in no file
that was trained on.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_INTERNET = """
    email http urllib html xmlrpc wsgiref ftplib imaplib poplib smtplib smtpd nntplib telnetlib mailbox mailcap
    mimetypes socketserver ssl socket webbrowser cgi cgitb netrc ipaddress asyncore asynchat
"""
# Tests, tools for old code, tables, and what some systems package apart.
_NOT_READ = """
    test idlelib lib2to3 tkinter turtle turtledemo site-packages encodings pydoc_data ensurepip distutils
    __phello__ lib-dynload msilib
"""
DOMAIN, _LEFT_OUT = frozenset(_INTERNET.split()), frozenset(_NOT_READ.split())
MOST_CHARACTERS = 100_000  # of a file; larger ones would be a large part of the whole
TRAINING = {False: 1_500_000, True: 700_000}  # characters outside the domain and in it, about


@dataclass(frozen=True)
class Source:
    """A file: the module or package at the top, its path below the library, and its text."""

    top: str
    name: str
    text: str


@dataclass(frozen=True)
class Function:
    """A function or class with a docstring: where it is, its name, and the first sentence about it."""

    top: str
    file: str
    name: str
    summary: str


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    """All files of the standard library that are text for training, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for entry in sorted(root.iterdir()):  # not all below it, where installed packages are as well
        top = entry.name.removesuffix(".py")
        if top in _LEFT_OUT or top.startswith(("config-", "_sysconfig")):
            continue
        for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []:
            parts = path.relative_to(root).parts
            text = path.read_text(encoding="utf-8", errors="replace")
            if 500 <= len(text) <= MOST_CHARACTERS and not {"test", "tests"} & set(parts):
                found.append(Source(top, "/".join(parts), text))
    return tuple(found)


def split(domain: bool, seed: int, share: float = 1.0) -> tuple[list[Source], list[Source]]:
    """Files of the domain, or of everything else: for training, and a part held out."""
    files = [source for source in sources() if (source.top in DOMAIN) == domain]
    random.Random(seed).shuffle(files)
    parts: tuple[list[Source], list[Source]] = ([], [])
    for part, limit in zip(parts, (share * TRAINING[domain], share * TRAINING[domain] / 8), strict=True):
        while files and sum(len(source.text) for source in part) < limit:
            part.append(files.pop())
    return parts


def functions(files: Sequence[Source]) -> list[Function]:
    """Functions and classes of some files whose docstring begins with a sentence; every name and sentence once."""
    found: dict[str, Function] = {}
    seen: set[str] = set()
    for source in files:
        for name, summary in _documented(source.text):
            if name not in found and summary not in seen:
                found[name] = Function(source.top, source.name, name, summary)
                seen.add(summary)
    return list(found.values())


def _documented(text: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = re.split(r"(?<=[.!?])\s|\n\s*\n", (ast.get_docstring(node) or "").strip(), maxsplit=1)[0]
            summary = " ".join(first.split())
            if 15 <= len(summary) <= 90 and 4 <= len(node.name) <= 24 and not node.name.startswith("__"):
                yield node.name, summary
