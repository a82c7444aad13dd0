"""Pieces of the standard library that questions are asked about: paragraphs, statements, calls, functions, examples.

All of it is parsed, nothing is run.
"""

from __future__ import annotations

import ast
import doctest
import io
import itertools
import re
import textwrap
import tokenize
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from claims.corpus import Source

Documented: TypeAlias = "ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SIMPLE = (ast.Assign, ast.AugAssign, ast.Return, ast.Raise, ast.Expr, ast.Assert, ast.Delete)
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"
ALL_SIGNS = OPENING + CLOSING + QUOTES


def paragraphs(source: Source) -> Iterator[str]:
    """Paragraphs of docstrings and of comments that are prose: no examples, nothing indented, no licences."""
    texts = [
        ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source.text)) if isinstance(node, _DOCUMENTED)
    ]
    blocks = re.findall(r"(?:^[ \t]*# .*\n)+", source.text, flags=re.MULTILINE)
    comments = [re.sub(r"^[ \t]*# ", "", block, flags=re.MULTILINE) for block in blocks]
    for text in (*texts, *comments):
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            prose = not paragraph.startswith((" ", "\t")) and not re.search(
                r">>>|[Cc]opyright|[Ll]icen[sc]e|^[-=*]", words
            )
            if prose and 40 <= len(words) <= 400:
                yield words


def statements(source: Source) -> Iterator[str]:
    """Statements without a block, as they are written, without the docstrings."""
    lines = source.text.splitlines()
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, _SIMPLE) and not _is_text(node):
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).strip()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def words_in_place(source: Source) -> Iterator[tuple[int, int, bool]]:
    """Where words of two letters and more begin and end, and whether they are prose: in a comment or docstring.

    Other words are names and keywords of the code; strings that are no docstring are left out.
    """
    starts = [0, *itertools.accumulate(len(line) + 1 for line in source.text.split("\n"))]
    documented = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source.text))
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        is_prose = token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.start[0] in documented)
        if is_prose or token.type == tokenize.NAME:
            begin = starts[token.start[0] - 1] + token.start[1]
            for word in re.finditer(r"[^\W\d_]\w+", token.string):
                yield begin + word.start(), begin + word.end(), is_prose


def documented_functions(source: Source) -> Iterator[tuple[str, str]]:
    """The first sentence about a function, and the function without its docstring, its decorators and its name."""
    lines = source.text.splitlines()
    for node in ast.walk(ast.parse(source.text)):
        if isinstance(node, _FUNCTIONS) and ast.get_docstring(node) and len(node.body) > 1:
            first = re.split(r"(?<=[.!?])\s|\n\s*\n", (ast.get_docstring(node) or "").strip(), maxsplit=1)[0]
            sentence = " ".join(first.split())
            body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            if 20 <= len(sentence) <= 160 and len(body.splitlines()) >= 3:
                yield sentence, f"def _({ast.unparse(node.args)}):\n{body}"


def calls(source: Source, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The text before a call of a method, up to the dot, and the method's name, of those that are asked for."""
    for found in re.finditer(rf"[\w)\]\"']\.({'|'.join(names)})\(", source.text):
        yield source.text[max(0, found.start(1) - 400) : found.start(1)], found[1]


def balanced(text: str) -> bool:
    """Whether brackets match outside strings, and every string ends."""
    expected: list[str] = []
    quote, skip = "", False
    for character in text:
        if skip:
            skip = False
        elif quote:
            skip = character == "\\"
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        elif character in OPENING:
            expected.append(CLOSING[OPENING.index(character)])
        elif character in CLOSING and (not expected or expected.pop() != character):
            return False
    return not expected and not quote


@lru_cache(maxsize=1)
def examples(root: Path) -> tuple[tuple[str, str, str], ...]:
    """(file, source, output) of the interactive examples in all strings below a folder, one line of output each."""
    found: dict[tuple[str, str], str] = {}
    parser = doctest.DocTestParser()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if ">>> " not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ">>> " in node.value:
                for source, output in _examples(parser, node.value):
                    found.setdefault((source, output), "/".join(parts))
    return tuple((file, source, output) for (source, output), file in found.items())


def _examples(parser: doctest.DocTestParser, text: str) -> Iterator[tuple[str, str]]:
    try:
        parsed = parser.get_examples(text)
    except ValueError:  # an example that is written wrongly
        return
    for example in parsed:
        lines = example.want.strip().splitlines()
        one = len(lines) == 1 or (lines and lines[0].startswith("Traceback"))
        if one and len(example.source) <= 160 and "..." not in lines[-1] and len(lines[-1]) <= 100:
            yield example.source.strip(), lines[-1].strip()
