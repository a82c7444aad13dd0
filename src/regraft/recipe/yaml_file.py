"""YAML that knows its lines, and takes nothing that a recipe does not need.

Built on PyYAML's event stream rather than on its loader, because every later message has to name the line of the key
it is about, and because the stream never builds objects: tags are refused, duplicate keys are errors, aliases may not
multiply a file beyond `MAX_NODES`, nesting and size are bounded. Scalars follow YAML 1.2's core schema: `1e-3` is a
number, and of the plain words only true, false and null mean something else than themselves (so `no` is a text).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from regraft.errors import UserError

MAX_BYTES = 1_000_000
MAX_NODES = 50_000
MAX_DEPTH = 32

_WORDS: dict[str, Any] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"]),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,15}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, eq=False)
class Node:
    """A piece of YAML: `value` is a scalar, a tuple of nodes or a dict of them; `line` counts from 1.

    `text` is what the file says for a scalar. The node of a mapping's value has the line of its key. `size` counts the
    nodes within, those that an alias repeats as often as it does; `height` is the number of levels below.
    """

    value: Any
    line: int
    text: str = ""
    size: int = 1
    height: int = 0

    def plain(self) -> Any:
        """The value without lines: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        UserError: RG306 if it is missing, no file, too large or not UTF-8.
    """
    fix = "name a YAML file"
    try:
        if path.exists() and not path.is_file():
            raise UserError("RG306", "the recipe is no regular file", where=str(path), fix=fix)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("RG306", f"the recipe cannot be read: {reason}", where=str(path), fix=fix) from None
    _check_size(len(data), path.name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        what = f"byte 0x{data[error.start]:02x} is not UTF-8"
        where = f"{path.name}, line {line}, column {column}"
        raise UserError("RG306", what, where=where, fix="save the recipe as UTF-8") from None


def parse_yaml(text: str, name: str = "recipe") -> Node:
    """The top-level mapping of a YAML text.

    Args:
        text: the whole file.
        name: of the file, for messages.

    Raises:
        UserError: RG306 with line and column for what is no YAML, or not a mapping, or refused here; RG309 for a file
            of several documents.
    """
    first, *others = parse_documents(text, name)
    if others:
        what = f"the file holds several documents; the second starts in line {others[0].line}"
        fix = "write them as steps of one recipe, or as one file each"
        raise UserError("RG309", what, where=name, fix=fix)
    return first


def parse_documents(text: str, name: str = "recipe") -> list[Node]:
    """The top-level mappings of all documents of a YAML text, at least one; arguments and errors as `parse_yaml`."""
    _check_size(len(text.encode("utf-8", "surrogatepass")), name)
    try:
        roots = _Builder(text, name).documents()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.problem, error.context) if part)
        raise UserError("RG306", what, where=f"{name}{place}", fix="correct the YAML") from None
    except (ValueError, OverflowError):  # from PyYAML: an escape such as "\\UFFFFFFFF", a version of 5000 digits
        what = "it has an escape or a directive with a number that is too large"
        raise UserError("RG306", what, where=name, fix="correct the YAML") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        what = f"the character {error.character!r} is not allowed in YAML"
        raise UserError("RG306", what, where=f"{name}, line {line}, column {column}", fix="remove it") from None
    for root in roots:
        if not isinstance(root.value, dict):
            what = "the recipe is empty" if root.value is None else "the top level of the recipe is not a mapping"
            fix = "start with models: and steps:, or with merge_method:"
            raise UserError("RG306", what, where=f"{name}, line {root.line}, column 1", fix=fix)
    return roots


def _check_size(size: int, name: str) -> None:
    if size > MAX_BYTES:
        what = f"the recipe has more than {MAX_BYTES:,} bytes"
        raise UserError("RG306", what, where=name, fix="name a recipe, not a model or a data file")


class _Builder:
    """One pass over the events of a text."""

    def __init__(self, text: str, name: str) -> None:
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._name = name
        self._anchors: dict[str, Node] = {}
        self._nodes = 0

    def documents(self) -> list[Node]:
        next(self._events)  # start of the stream
        roots = []
        while not isinstance(next(self._events), yaml.StreamEndEvent):
            roots.append(self._node(next(self._events), 0))
            next(self._events)  # end of the document
            self._anchors.clear()
        if len(roots) > 1 and roots[-1].value is None:
            roots.pop()  # what a file that ends in --- seems to begin
        return roots or [Node(None, 1)]

    def _node(self, event: Any, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._refused(event, f"the alias *{event.anchor} stands for nothing, or for itself")
            node = replace(self._anchors[event.anchor], line=_line(event))
            self._count(event, node.size)
            self._check_depth(event, depth + node.height)
            return node
        if event.tag is not None and not (event.tag == "!" and isinstance(event, yaml.ScalarEvent)):
            raise self._refused(event, f"the tag {event.tag} is refused, a recipe holds plain values only")
        self._check_depth(event, depth)
        self._count(event, 1)
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _scalar(self, event: yaml.ScalarEvent) -> Node:
        text = self._text(event)
        return Node(scalar(text) if event.implicit[0] else text, _line(event), text)

    def _text(self, event: yaml.ScalarEvent) -> str:
        """What a scalar says, with characters that are escaped in two halves (as JSON does) put together."""
        try:
            return str(event.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self._refused(event, "the text has half of a character in it") from None

    def _sequence(self, event: Any, depth: int) -> Node:
        entries = []
        while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
            entries.append(self._node(inner, depth + 1))
        return _parent(tuple(entries), entries, event)

    def _mapping(self, event: Any, depth: int) -> Node:
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(inner := next(self._events), yaml.MappingEndEvent):
            if not isinstance(inner, yaml.ScalarEvent) or inner.tag is not None:
                raise self._refused(inner, "a key has to be a plain text")
            key, line = self._text(inner), _line(inner)
            value = self._node(next(self._events), depth + 1)
            if key == "<<" and inner.implicit[0]:
                merged.update(self._merge_key(inner, value))
                continue
            if key in entries:
                raise self._refused(inner, f"the key {key!r} is there twice (first in line {entries[key].line})")
            entries[key] = replace(value, line=line)
        entries = {**merged, **entries}
        return _parent(entries, entries.values(), event)

    def _merge_key(self, event: yaml.ScalarEvent, value: Node) -> dict[str, Node]:
        """`<<: *defaults`: entries of other mappings, the first one that has a key counts."""
        sources = value.value if isinstance(value.value, tuple) else (value,)
        found: dict[str, Node] = {}
        for source in sources:
            if not isinstance(source.value, dict):
                raise self._refused(event, "<< takes a mapping, or a list of mappings")
            found = {**source.value, **found}
        return found

    def _check_depth(self, event: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._refused(event, f"the recipe is nested more than {MAX_DEPTH} levels deep")

    def _count(self, event: Any, size: int) -> None:
        self._nodes += size
        if self._nodes > MAX_NODES:
            raise self._refused(event, f"the recipe has more than {MAX_NODES:,} values, aliases written out")

    def _refused(self, event: Any, what: str) -> UserError:
        mark = event.start_mark
        where = f"{self._name}, line {mark.line + 1}, column {mark.column + 1}"
        return UserError("RG306", what, where=where, fix="correct the YAML")


def _parent(value: Any, children: Collection[Node], event: Any) -> Node:
    size, height = 1 + sum(n.size for n in children), 1 + max((n.height for n in children), default=0)
    return Node(value, _line(event), size=size, height=height)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def scalar(text: str) -> Any:
    """What a plain scalar means in YAML 1.2: None, bool, int, float, or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if len(text) <= 64 and _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float(f"{special[1] or ''}inf") if special[2] else float("nan")
    return text
