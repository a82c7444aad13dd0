"""What a model card states, what it leaves out, and where it contradicts the files beside it. Nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.licences import front_matter, read_licence, strings

# What users look for in a card and the key of its front matter.
WANTED = {
    "license": "licence",
    "language": "languages",
    "datasets": "training data",
    "base_model": "base model",
    "pipeline_tag": "task",
    "model-index": "evaluation results",
}
# Task of the Hub -> what the output of such a model is for, as `architecture` calls it.
TASK_HEADS = {
    "text-generation": ("causal language model",),
    "fill-mask": ("masked language model", "pre-training"),
    "text-classification": ("sequence classification",),
    "token-classification": ("token classification",),
    "question-answering": ("question answering",),
    "image-classification": ("image classification",),
    "zero-shot-image-classification": ("similarity of text and image",),
    "text2text-generation": ("sequence to sequence",),
    "translation": ("sequence to sequence", "causal language model"),
    "summarization": ("sequence to sequence", "causal language model"),
}
_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# Every repetition is bounded: a card is a stranger's text, and a search must not take a time beyond its length.
_PARAMETERS = re.compile(
    r"(?<![\w.])(\d{1,15}(?:[.,]\d{1,15}){0,6})\s{0,5}(k|m|b|t|million|billion|trillion)?\s{1,20}param\w{0,20}",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"(?:context|sequence)\s{1,20}(?:length|window|size)"
    r"[\s=:*|]{0,20}(?:(?:of|is|up to|to)[\s=:*|]{0,20}){0,3}(\d[\d,]{0,20})\s{0,5}(k)?\b",
    re.IGNORECASE,
)
# A size in words is rounded ("7B" is 6.7), and embeddings may or may not be counted.
_TOLERANCE = 0.15
_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class Contradiction:
    """A statement of the card and what the files say instead."""

    subject: str
    card: str
    found: str


@dataclass(frozen=True)
class CardFacts:
    """What the card states; `licences` are identifiers, `silent` what users look for and do not find."""

    licences: tuple[str, ...]
    licence_link: str | None
    licence_file: str | None
    languages: tuple[str, ...]
    datasets: tuple[str, ...]
    base_models: tuple[str, ...]
    base_relation: str | None
    task: str | None
    silent: tuple[str, ...]
    remark: str | None


def card(checkpoint: Checkpoint) -> CardFacts:
    """The statements in the front matter of a model's README.md."""
    data, remark = front_matter(checkpoint)
    licence = read_licence(checkpoint)
    stated = {key for key in WANTED if data.get(key) not in (None, "", [], {})}
    if not licence.ids:
        stated.discard("license")
    return CardFacts(
        licences=licence.ids,
        licence_link=licence.link or None,
        licence_file=licence.file or None,
        languages=tuple(strings(data.get("language"))),
        datasets=tuple(strings(data.get("datasets"))),
        base_models=tuple(strings(data.get("base_model"))),
        base_relation=next(iter(strings(data.get("base_model_relation"))), None),
        task=next(iter(strings(data.get("pipeline_tag"))), None),
        silent=tuple(text for key, text in WANTED.items() if key not in stated),
        remark=remark or None,
    )


def contradictions(
    checkpoint: Checkpoint, *, task: str | None, head: str | None, sizes: Sequence[int], context: int | None
) -> list[Contradiction]:
    """Where the card disagrees with what was found.

    Args:
        task: the card's `pipeline_tag`; head: what the output is for, as found.
        sizes: numbers of parameters that would be right (with and without embeddings); empty if not known.
        context: most positions, None if there is no limit or it is not known.
    """
    found = []
    text = _prose(checkpoint)
    if task in TASK_HEADS and head is not None and head not in TASK_HEADS[task]:
        found.append(Contradiction("task", task, head if head != "none" else "no head"))
    claims = [(m[0], _number(m[1]) * _UNITS[(m[2] or "").lower()]) for m in _PARAMETERS.finditer(text)]
    if claims and sizes and not any(_near(value, size) for _, value in claims for size in sizes):
        found.append(Contradiction("parameters", "; ".join(dict.fromkeys(t for t, _ in claims)), f"{sizes[0]:,}"))
    spans = [(m[0], _number(m[1]), bool(m[2])) for m in _CONTEXT.finditer(text)]
    if spans and context is not None and not any(_spans(value, kilo, context) for _, value, kilo in spans):
        found.append(Contradiction("context length", "; ".join(dict.fromkeys(t for t, _, _ in spans)), f"{context:,}"))
    return [Contradiction(c.subject, " ".join(c.card.split()), c.found) for c in found]


def _prose(checkpoint: Checkpoint) -> str:
    """The card, its front matter included, without its blocks of code."""
    return re.sub(r"```.*?```", "", card_text(checkpoint), flags=re.DOTALL)


def card_text(checkpoint: Checkpoint) -> str:
    """README.md as it is, up to a megabyte; "" if there is none."""
    path = checkpoint.files.get("README.md")
    if path is None:
        return ""
    with path.open("rb") as file:
        return file.read(_CARD_BYTES).decode("utf-8", errors="replace")


def _number(text: str) -> float:
    """A number as people write it: 1,234 has thousands, 1.3 and 1,3 have decimals."""
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return float(text.replace(",", ""))
    parts = re.split(r"[.,]", text)
    return float("".join(parts)) if len(parts) > 2 else float(text.replace(",", "."))


def _near(claim: float, size: int) -> bool:
    return abs(claim - size) <= _TOLERANCE * size


def _spans(value: float, kilo: bool, context: int) -> bool:
    return context in ((round(value * 1024), round(value * 1000)) if kilo else (round(value),))
