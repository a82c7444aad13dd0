"""How two model cards differ: field by field of the front matter, section by section of the text."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.licences import front_matter, short_name
from regraft.inspect.card_sections import Section, sections


@dataclass(frozen=True)
class FieldChange:
    """A key of the front matter (`model-index` and the like by dotted path); None where a card does not have it."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class SectionChange:
    """A section that one card lacks or that reads differently: `kind` is "only in a", "only in b" or "changed", and
    `lines` are those of a unified difference."""

    heading: str
    kind: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class CardDiff:
    """The result of `diff`. `remarks`: a card that is missing or whose front matter cannot be read."""

    a: str
    b: str
    fields: tuple[FieldChange, ...]
    sections: tuple[SectionChange, ...]
    remarks: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.fields and not self.sections

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"same": self.same}


def diff(a: Checkpoint, b: Checkpoint) -> CardDiff:
    """Compare the cards of two models; the order of keys, and of texts in a list, makes no difference."""
    (mine, remark_a), (theirs, remark_b) = front_matter(a), front_matter(b)
    one, other = (dict(_flat("", data)) for data in (mine, theirs))
    keys = list(dict.fromkeys([*one, *other]))
    fields = [FieldChange(k, one.get(k), other.get(k)) for k in keys if _key(one.get(k)) != _key(other.get(k))]
    names = short_name(a), short_name(b)
    remarks = [f"{who}: {remark}" for who, remark in zip(names, (remark_a, remark_b), strict=True) if remark]
    return CardDiff(*names, tuple(fields), tuple(_sections(sections(a), sections(b))), tuple(remarks))


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """Leaves by dotted path; a list of texts is one leaf."""
    if isinstance(value, Mapping):
        return [leaf for k, v in value.items() for leaf in _flat(f"{prefix}.{k}" if prefix else str(k), v)]
    if isinstance(value, list) and any(isinstance(v, (Mapping, list)) for v in value):
        return [leaf for i, v in enumerate(value) for leaf in _flat(f"{prefix}[{i}]", v)]
    return [(prefix, value)] if prefix else []


def _key(value: Any) -> Any:
    if isinstance(value, list):
        return sorted(map(str, value)) if len(value) != 1 else str(value[0])
    return value


def _sections(mine: Sequence[Section], theirs: Sequence[Section]) -> list[SectionChange]:
    a, b = _by_heading(mine), _by_heading(theirs)
    changes = []
    for heading in dict.fromkeys([*a, *b]):
        if a.get(heading) == b.get(heading):
            continue
        kind = "changed" if heading in a and heading in b else "only in a" if heading in a else "only in b"
        before, after = (text.get(heading, "").splitlines() for text in (a, b))
        lines = list(difflib.unified_diff(before, after, lineterm="", n=1))[2:]
        changes.append(SectionChange(heading, kind, tuple(lines)))
    return changes


def _by_heading(parts: Sequence[Section]) -> dict[str, str]:
    """Sections by heading, a second one of the same heading by its number."""
    found: dict[str, str] = {}
    for part in parts:
        name, n = part.heading, 2
        while name in found:
            name, n = f"{part.heading} ({n})", n + 1
        found[name] = part.text
    return found
