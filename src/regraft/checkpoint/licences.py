"""What licence a model made of several models has, from what their cards say. This is a filter, not legal advice.

Only statements count: the `license` of a card's front matter. A licence file is noticed and carried along but not
interpreted, and a licence that is not stated stays unknown: a guess, once published, becomes other people's fact.
The rule: parents under one licence keep it; permissive licences combine to the one with most duties, and all their
notices go along; any other mixture is a conflict that the user has to accept, since whether it may be published
is a question about contracts and not about names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from regraft.checkpoint.model import Checkpoint

# Kinds, as the Hub's licence ids are sorted below.
PERMISSIVE = "permissive"  # any use, if notices are kept
SHARE_ALIKE = "share-alike"  # changed versions stay under the same licence (copyleft)
NON_COMMERCIAL = "non-commercial"
NO_DERIVATIVES = "no-derivatives"
NAMED = "a licence with terms of its own"  # use policies, naming duties, thresholds of size

# Permissive ones from fewest to most duties (those of a row are equal); the Hub's identifiers.
_PERMISSIVE = (
    ("cc0-1.0", "unlicense", "pddl", "wtfpl"),
    ("mit", "isc", "zlib", "bsd", "bsd-2-clause", "bsl-1.0", "ncsa", "postgresql", "ofl-1.1"),
    ("bsd-3-clause", "bsd-3-clause-clear", "afl-3.0", "ms-pl", "artistic-2.0"),
    ("apache-2.0", "ecl-2.0"),
    ("odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0", "etalab-2.0"),
    ("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
)
# The Hub's identifiers of other kinds, then names that cards give beside `license: other`.
_HUB: dict[tuple[str, ...], str] = {
    (SHARE_ALIKE,): "gpl gpl-2.0 gpl-3.0 agpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr mpl-2.0 epl-1.0 epl-2.0 eupl-1.1 "
    "eupl-1.2 osl-3.0 odbl gfdl cdla-sharing-1.0 cc-by-sa-3.0 cc-by-sa-4.0",
    (NON_COMMERCIAL,): "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0",
    (NON_COMMERCIAL, SHARE_ALIKE): "cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0",
    (NO_DERIVATIVES,): "cc-by-nd-4.0",
    (NO_DERIVATIVES, NON_COMMERCIAL): "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0",
    (NAMED,): "openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m apple-ascl c-uda "
    "bigscience-bloom-rail-1.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma",
    (NAMED, NON_COMMERCIAL): "deepfloyd-if-license apple-amlr intel-research h-research "
    "fair-noncommercial-research-license",
    (): "cc lppl-1.3c",  # families and licences whose kind the identifier does not tell
}
_NAMES: dict[tuple[str, ...], str] = {
    (NAMED,): "qwen tongyi-qianwen deepseek deepseek-license falcon-llm-license yi-license",
    (NAMED, NON_COMMERCIAL): "mistral-ai-research mistral-research mrl mnpl qwen-research",
}
_LLAMA_DUTY = 'its text asks for a model name that begins with "Llama" and for a "Built with" notice'
_DUTIES = dict.fromkeys(("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"), _LLAMA_DUTY) | {
    "gemma": "its terms and use restrictions must be passed on",
}
_RANK = {name: rank for rank, row in enumerate(_PERMISSIVE) for name in row}
_ON_HUB = set(_RANK) | {name for names in _HUB.values() for name in names.split()}
_KINDS: dict[str, frozenset[str]] = {
    name: frozenset(group) for table in (_HUB, _NAMES) for group, names in table.items() for name in names.split()
} | dict.fromkeys(_RANK, frozenset({PERMISSIVE}))
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_CARD_BYTES = 1 << 20
_CARD_DEPTH = 50
_CARD_EVENTS = 100_000  # ten times those of a card with the scores of a large benchmark
# Texts only: the language "no" must not become False. The same in C, where PyYAML has it, for the cards of benchmarks.
_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


@dataclass(frozen=True)
class Statement:
    """What one model says about its licence.

    Attributes:
        ids: licence identifiers in lower case, empty if none is stated; `name` replaces the Hub's "other".
        link: where the text of a named licence is, as the card says.
        file: name of a licence file in the folder ("" if there is none); its text is not interpreted.
        remark: why nothing is known, for example that the card is unreadable.
    """

    ids: tuple[str, ...] = ()
    link: str = ""
    file: str = ""
    remark: str = ""


@dataclass(frozen=True)
class LicenceVerdict:
    """The licence of the result.

    Attributes:
        licence: identifier, or None where it is unknown or the parents' licences do not determine one.
        conflicts: one sentence each; a caller stops with RG404 if there are any and the user has not accepted them.
        unknown: one sentence for each parent whose licence is not known.
        inherited: duties that come along, one sentence each.
        link: where the text is, for licences that are not in the Hub's list.
    """

    licence: str | None
    conflicts: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    inherited: list[str] = field(default_factory=list)
    link: str = ""


def kinds(licence: str) -> frozenset[str]:
    """Kinds of a licence identifier; empty for one whose kind is not known."""
    return _KINDS.get(licence, frozenset())


def on_hub(licence: str) -> bool:
    """Whether the Hub lists this identifier; others are written as `license: other` with a name."""
    return licence in _ON_HUB


def short_name(parent: Checkpoint) -> str:
    """How a text names a parent: its Hub id, or the name of its folder; never a path."""
    return parent.repo_id or parent.path.resolve().name


def front_matter(parent: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """Metadata at the head of a model's README.md, and a remark ("" if all is well).

    A card that is missing, that has no front matter or an invalid one, gives an empty mapping.
    """
    readme = parent.files.get("README.md")
    if readme is None:
        return {}, "it has no card"
    with readme.open("rb") as file:
        text = file.read(_CARD_BYTES).decode("utf-8", errors="replace")
    found = _FRONT_MATTER.match(text)
    if not found:
        return {}, "its card has no front matter"
    try:
        if _too_much(found[1]):
            return {}, "the front matter of its card is too long or nested too deeply"
        data = yaml.load(found[1], Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):  # the last two: numbers of no character
        return {}, "the front matter of its card is not valid YAML"
    if not isinstance(data, dict):
        return {}, "the front matter of its card is no mapping"
    return data, ""


def _too_much(text: str) -> bool:
    """Whether YAML takes seconds to load, or is so deep that the loader, in C, would end the process."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _CARD_DEPTH or count > _CARD_EVENTS:
            return True
    return False


def strings(value: Any) -> list[str]:
    """A text or a list of texts of a card's front matter as a list; anything nested is left out.

    Halves of characters, which YAML can write as escapes and no file can hold, become question marks.
    """
    values = value if isinstance(value, list) else [value]
    texts = (v.encode(errors="replace").decode().strip() for v in values if isinstance(v, str))
    return [text for text in texts if text]


def read_licence(parent: Checkpoint) -> Statement:
    """The licence that a model's card states."""
    data, remark = front_matter(parent)
    file = next((n for n in sorted(parent.files) if any(fnmatch(n.upper(), p) for p in LICENCE_FILES[:2])), "")
    names = [name.lower() for name in strings(data.get("license"))]
    if "other" in names:
        given = strings(data.get("license_name"))
        names = [n for n in names if n != "other"] + [n.lower() for n in given]
        remark = remark or ("" if given else "its card says 'other' and names no licence")
        if not given:
            names = []
    names = [n for n in names if n not in ("unknown", "none", "null")]
    link = next(iter(strings(data.get("license_link"))), "")
    if not names:
        remark = remark or "its card states no licence"
    return Statement(tuple(dict.fromkeys(names)), link, file, "" if names else remark)


def combine(parents: Sequence[Checkpoint]) -> LicenceVerdict:
    """The licence of a model made of `parents`. No legal advice."""
    unknown: list[str] = []
    stated: dict[str, list[str]] = {}  # licence -> parents under it
    link = ""
    for parent in parents:
        who, statement = short_name(parent), read_licence(parent)
        if not statement.ids:
            beside = f"; {statement.file} was not interpreted" if statement.file else ""
            unknown.append(f"{who}: {statement.remark}{beside}")
        for stated_id in statement.ids:
            stated.setdefault(stated_id, []).append(who)
            link = link or statement.link
        unknown += [f"{adapter}: the licence of an adapter is not read" for adapter in parent.adapters]
    conflicts = _conflicts(stated)
    restrictive = [name for name in stated if PERMISSIVE not in kinds(name)]
    licence: str | None = None
    if stated and not unknown and len(restrictive) < 2:
        licence = restrictive[0] if restrictive else max(stated, key=lambda name: (_RANK[name], name))
    inherited = [
        f"{name}, of {_list(who)}: {_DUTIES.get(name, 'its notice and terms go along')}"
        for name, who in sorted(stated.items())
        if name != licence or name in _DUTIES
    ]
    return LicenceVerdict(licence, conflicts, unknown, inherited, link if licence and not on_hub(licence) else "")


def _conflicts(stated: Mapping[str, Sequence[str]]) -> list[str]:
    sentences = [
        f"{name} ({_list(who)}) allows no changed versions"
        for name, who in stated.items()
        if NO_DERIVATIVES in kinds(name)
    ]
    if len(stated) == 1:
        return sentences
    for name, who in stated.items():
        others = _list([other for other in stated if other != name])
        found = kinds(name)
        if not found:
            sentences.append(f"the terms of {name} ({_list(who)}) are not known here, nor whether {others} fits them")
        elif PERMISSIVE not in found:
            kind = " and ".join(sorted(found - {NO_DERIVATIVES})) or NO_DERIVATIVES
            sentences.append(f"{name} ({_list(who)}) is {kind}, and {others} is not the same licence")
    return sentences


def _list(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
