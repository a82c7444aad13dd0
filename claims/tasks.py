"""Six questions about the standard library's text whose answers stand in the text, so that nobody had to label it.

| Task | Question | What is split |
|---|---|---|
| `module` | which package a paragraph of a docstring or comment comes from | files of each package |
| `prose` | whether a hidden word is code, or comment or docstring | files; tests on files not pre-trained on |
| `call` | which method is called next | the same |
| `balance` | which bracket or quote is hidden in a statement, where only one fits all others | the same |
| `retrieval` | which function, its name hidden, a sentence is the docstring of | files |
| `doctest` | which output belongs to an interactive example | files |

Parts are train, validation and test. What occurs twice stays in the first of these parts alone, so that nothing that is
tested on was trained on under another file's name. Classes have equal shares everywhere: chance is one over their
number.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from claims import corpus, passages
from claims.corpus import Source

PARTS = ("train", "validation", "test")
HIDDEN = "…"  # in the place of what is asked about
AROUND = 80  # characters before and after a word
SIGNS = ("(", ")", "[", "]", '"', "'")
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml", "http", "urllib")
METHODS = (
    "append", "close", "format", "get", "items", "join", "pop", "read", "replace", "split", "startswith", "write",
)  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A text, the number of its class, and the file that it is from."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Task:
    """A question with a few answers: passages by part."""

    question: str
    classes: tuple[str, ...]
    parts: dict[str, list[Passage]]

    @property
    def chance(self) -> float:
        return 1 / len(self.classes)


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together, and the file that they are from."""

    left: str
    right: str
    file: str


@dataclass(frozen=True)
class Matching:
    """A question whose answer is one of `among` others: pairs by part, in groups of as many."""

    question: str
    among: int
    parts: dict[str, list[Pair]]

    @property
    def chance(self) -> float:
        return 1 / self.among


def alike(text: str) -> str:
    """What two texts share that are the same but for white space and capitals."""
    return " ".join(text.lower().split())


@lru_cache(maxsize=4)
def split_files(seed: int) -> dict[str, list[Source]]:
    """Files by part. Those for training are what the zoo's decoder and encoder of that seed are pre-trained on and, as
    large a share, the internet's; validation and test divide all others."""
    seen = [source for domain in (False, True) for source in corpus.split(domain, seed)[0]]
    names = {source.name for source in seen}
    others = [source for source in corpus.sources() if source.name not in names]
    random.Random(seed).shuffle(others)
    cut = len(others) // 4
    return {"train": seen, "validation": others[:cut], "test": others[cut:]}


def _parsed(seed: int, scale: str, most: int | None = None) -> dict[str, list[Source]]:
    """The same, but no more files of a part than are needed, for parsing takes time."""
    return {part: files[: most if scale == "laptop" else 10] for part, files in split_files(seed).items()}


def _balanced_parts(
    found: dict[str, list[Passage]], classes: int, most: dict[str, int], seed: int
) -> dict[str, list[Passage]]:
    """Equally many passages of each class, at most `most` of each, and none that an earlier part has."""
    seen: set[str] = set()
    parts = {}
    for part in PARTS:
        fresh = {alike(passage.text): passage for passage in found[part] if alike(passage.text) not in seen}
        seen |= fresh.keys()
        of_class = [[p for p in fresh.values() if p.label == label] for label in range(classes)]
        draw = random.Random(f"{seed} {part}")
        count = min(most[part], *(len(passages) for passages in of_class))
        parts[part] = [passage for passages in of_class for passage in draw.sample(passages, count)]
        draw.shuffle(parts[part])
    return parts


def _sizes(scale: str, train: int, validation: int, test: int) -> dict[str, int]:
    counts = (train, validation, test) if scale == "laptop" else (3, 2, 2)
    return dict(zip(PARTS, counts, strict=True))


def module(seed: int, scale: str) -> Task:
    """Eight examples of each package to learn from; its name is hidden."""
    names = re.compile("|".join(PACKAGES), re.IGNORECASE)
    found: dict[str, list[Passage]] = {part: [] for part in PARTS}
    for label, package in enumerate(PACKAGES):
        files = [source for source in corpus.sources() if source.top == package]
        random.Random(seed).shuffle(files)
        files = files if scale == "laptop" else files[:6]
        half, most = (len(files) + 1) // 2, max(1, len(files) // 6)
        for part, some in zip(PARTS, (files[:half], files[half : half + most], files[half + most :]), strict=True):
            for source in some:
                found[part] += [
                    Passage(names.sub(HIDDEN, words), label, source.name) for words in passages.paragraphs(source)
                ]
    parts = _balanced_parts(found, len(PACKAGES), _sizes(scale, 8, 12, 60), seed)
    return Task("Which package is this paragraph from?", PACKAGES, parts)


def prose(seed: int, scale: str) -> Task:
    """Six examples of each kind to learn from; at most 40 words of a file."""
    found: dict[str, list[Passage]] = {part: [] for part in PARTS}
    for part, files in _parsed(seed, scale, 60).items():
        draw = random.Random(f"{seed} {part}")
        for source in files:
            places = list(passages.words_in_place(source))
            for begin, end, is_prose in draw.sample(places, min(40, len(places))):
                before, after = source.text[max(0, begin - AROUND) : begin], source.text[end : end + AROUND]
                if HIDDEN not in before + after:
                    found[part].append(Passage(before + HIDDEN + after, int(is_prose), source.name))
    parts = _balanced_parts(found, 2, _sizes(scale, 6, 100, 400), seed)
    return Task("Is the hidden word code or prose?", ("code", "prose"), parts)


def call(seed: int, scale: str) -> Task:
    """Three examples of each method to learn from; the text before a call, which ends with a dot."""
    found: dict[str, list[Passage]] = {part: [] for part in PARTS}
    for part, files in split_files(seed).items():
        for source in files:
            found[part] += [
                Passage(before, METHODS.index(name), source.name) for before, name in passages.calls(source, METHODS)
            ]
    parts = _balanced_parts(found, len(METHODS), _sizes(scale, 3, 10, 40), seed)
    return Task("Which method is called next?", METHODS, parts)


def balance(seed: int, scale: str) -> Task:
    """Ten examples of each sign to learn from; whole statements that match, with one sign hidden."""
    found: dict[str, list[Passage]] = {part: [] for part in PARTS}
    for part, files in _parsed(seed, scale).items():
        draw = random.Random(f"{seed} {part}")
        for source in files:
            for statement in passages.statements(source):
                usual = 20 <= len(statement) <= 120 and "#" not in statement and HIDDEN not in statement
                if usual and passages.balanced(statement) and (hidden := without_sign(statement, draw)):
                    text, sign = hidden
                    found[part].append(Passage(text, SIGNS.index(sign), source.name))
    parts = _balanced_parts(found, len(SIGNS), _sizes(scale, 10, 50, 120), seed)
    return Task("Which bracket or quote is hidden?", SIGNS, parts)


def without_sign(statement: str, draw: random.Random) -> tuple[str, str] | None:
    """A statement with a sign hidden, and the sign; None if it has none, or another one would match as well."""
    of_sign = {sign: [i for i, c in enumerate(statement) if c == sign] for sign in SIGNS if sign in statement}
    if not of_sign:
        return None
    sign = draw.choice(sorted(of_sign))
    place = draw.choice(of_sign[sign])
    before, after = statement[:place], statement[place + 1 :]
    fit = [other for other in passages.ALL_SIGNS if passages.balanced(before + other + after)]
    return (before + HIDDEN + after, sign) if fit == [sign] else None


def _matched(found: dict[str, list[Pair]], among: int, most: dict[str, int], seed: int) -> dict[str, list[Pair]]:
    """Each text once, and in each part a multiple of `among` pairs."""
    seen: set[str] = set()
    parts = {}
    for part in PARTS:
        fresh = []
        for pair in random.Random(f"{seed} {part}").sample(found[part], len(found[part])):
            if alike(pair.left) not in seen and alike(pair.right) not in seen:
                fresh.append(pair)
                seen |= {alike(pair.left), alike(pair.right)}
        count = min(most[part], len(fresh))
        parts[part] = fresh[: count // among * among]
    return parts


def retrieval(seed: int, scale: str) -> Matching:
    found = {
        part: [
            Pair(sentence, function[:400], source.name)
            for source in files
            for sentence, function in passages.documented_functions(source)
        ]
        for part, files in _parsed(seed, scale).items()
    }
    among = 50 if scale == "laptop" else 2
    parts = _matched(found, among, _sizes(scale, 1000, 100, 300), seed)
    return Matching("Which function does this sentence describe?", among, parts)


def doctest(seed: int, scale: str) -> Matching:
    """Half of the files' examples for training. An output occurs once in all, as True would fit many examples."""
    examples = passages.examples(Path(sysconfig.get_paths()["stdlib"]))
    files = sorted({file for file, _, _ in examples})
    random.Random(seed).shuffle(files)
    capped: dict[str, list[Pair]] = {}
    for file in files:
        own = [Pair(source, output, file) for name, source, output in examples if name == file]
        capped[file] = random.Random(seed).sample(own, min(len(own), 150))
    total = sum(len(pairs) for pairs in capped.values())
    found: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for pairs in capped.values():  # the part that is furthest from its share takes the next file
        wanted = dict(zip(PARTS, (0.55, 0.1, 0.35), strict=True))
        part = max(PARTS, key=lambda part: wanted[part] - len(found[part]) / total)
        found[part] += pairs
    among = 10 if scale == "laptop" else 2
    return Matching("What does this print?", among, _matched(found, among, _sizes(scale, 1000, 100, 300), seed))


CHOICES: dict[str, Callable[[int, str], Task]] = {f.__name__: f for f in (module, prose, call, balance)}
MATCHINGS: dict[str, Callable[[int, str], Matching]] = {f.__name__: f for f in (retrieval, doctest)}


def files_of(items: Iterable[Passage | Pair]) -> set[str]:
    return {item.file for item in items}
