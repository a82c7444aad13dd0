"""Sentence pairs from the documentation in Python's own library: what a function says first, and what it says next.

The files are parsed, never imported. A summary and the text below it are about the same thing, as a question and its
answer are, so they teach an encoder the language of programmers.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

Pair = tuple[str, str]


def read_pairs(limit: int, seed: int) -> list[Pair]:
    """Up to `limit` pairs (summary, following text), shuffled; every summary occurs once."""
    found: dict[str, str] = {}
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for summary, text in _pairs_of(file):
            found.setdefault(summary, text)
    pairs = sorted(found.items())
    random.Random(seed).shuffle(pairs)
    return pairs[:limit]


def _pairs_of(file: Path) -> Iterator[Pair]:
    tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            summary, _, text = (ast.get_docstring(node) or "").partition("\n\n")
            summary, text = " ".join(summary.split()), " ".join(text.split())
            if 25 <= len(summary) <= 200 and len(text) >= 60 and ">>>" not in text[:200]:
                yield summary, text[:300]
