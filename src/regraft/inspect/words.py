"""Facts, numbers and sizes as people read them, for terminals and pages alike.

`FACTS` has the facts of a model as titled readers; each gives a text, or None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regraft.inspect.architecture import Stack
    from regraft.inspect.facts import Facts

UNKNOWN = "unknown"
_MOST = 5  # names listed before "and 7 more"


def size_in_words(size: float) -> str:
    """`1234567` bytes as `1.23 MB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def count(number: float) -> str:
    """`1234567` as `1.23 M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """Three digits, or a question mark for what could not be measured."""
    return "?" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "?" if value is None else f"{value:.1%}"


def short_names(references: Sequence[str]) -> list[str]:
    """The last part of each reference, or the whole ones if those are not distinct."""
    short = [text.rstrip("/").rpartition("/")[2] or text for text in references]
    return short if len(set(short)) == len(short) else list(references)


def listed(items: Iterable[str], most: int = _MOST) -> str | None:
    """`a, b, c and 4 more`; None for nothing."""
    names = list(items)
    if not names:
        return None
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _kind(facts: Facts) -> str:
    shape = facts.architecture
    if facts.kind == "delta":
        return "delta, of which regraft delta show tells more"
    if facts.adapter is not None and facts.kind == "adapter":
        one = facts.adapter
        return f"{one.kind or 'unknown'} adapter, rank {_or(one.rank)}, alpha {_or(one.alpha)}"
    family = f"{shape.model_type or UNKNOWN}{'' if shape.known else ', layers inferred from names'}"
    return f"{', '.join(shape.classes) or UNKNOWN} ({family})"


def _layers(facts: Facts) -> str | None:
    return "; ".join(map(_stack, facts.architecture.stacks)) or None


def _stack(stack: Stack) -> str:
    layers = stack.layers if stack.layers is not None else stack.configured_layers
    parts = [f"{stack.name + ': ' if stack.name else ''}{_or(layers)}", f"width {_or(stack.hidden)}"]
    groups = f" ({stack.kv_heads} for keys and values)" if stack.kv_heads not in (None, stack.heads) else ""
    parts.append(f"{_or(stack.heads)} heads of {_or(stack.head_dim)}{groups}")
    parts.append(f"feed-forward {_or(stack.ffn)}")
    return ", ".join(parts)


def _vocabulary(facts: Facts) -> str | None:
    shape = facts.architecture
    rows = shape.vocabulary if shape.vocabulary is not None else shape.configured_vocabulary
    tied = {True: ", head tied to the embedding", False: ", head of its own", None: ""}[shape.tied]
    return None if rows is None else f"{rows}{tied}"


def _positions(facts: Facts) -> str | None:
    shape = facts.architecture
    parts = [f"{shape.context} positions" if shape.context else "", shape.positions.kind or ""]
    parts.append(f"theta {shape.positions.theta:g}" if shape.positions.theta else "")
    parts.append(f"scaling {shape.positions.scaling}" if shape.positions.scaling else "")
    return ", ".join(p for p in parts if p) or None


def _size(facts: Facts) -> str | None:
    size = facts.size
    if size.parameters is None:
        return None
    inside = f", of these {count(size.embeddings)} in embeddings" if size.embeddings else ""
    return f"{count(size.parameters)} ({size.parameters:,}){inside}"


def _storage(facts: Facts) -> str | None:
    size = facts.size
    if size.bytes is None:
        return None
    whole = sum(size.dtypes.values()) or 1
    mixed = len(size.dtypes) > 1
    kinds = ", ".join(f"{name} {n / whole:.1%}" if mixed else name for name, n in size.dtypes.items())
    return f"{size_in_words(size.bytes)} in {size.tensors} tensors, {kinds}"


def _tokenizer(facts: Facts) -> str | None:
    tokens = facts.tokenizer
    if tokens is None:
        return None
    template = "with chat template" if tokens.chat_template else "no chat template"
    return f"{tokens.kind or 'unknown kind'}, {_or(tokens.size)} tokens, {template}, hash {tokens.hash or UNKNOWN}"


def _special(facts: Facts) -> str | None:
    if facts.tokenizer is None:
        return None
    return listed((f"{role} {token}" for role, token in facts.tokenizer.special.items()), most=9)


def _bases(facts: Facts) -> str | None:
    claims = (f"{b.model} ({b.source}{', ' + b.detail if b.detail else ''})" for b in facts.bases)
    return listed(claims) or UNKNOWN


def _licence(facts: Facts) -> str:
    stated = facts.card
    found = ", ".join(stated.licences) or (f"see {stated.licence_file}" if stated.licence_file else UNKNOWN)
    return f"{found} ({stated.licence_link})" if stated.licence_link else found


def _values(facts: Facts) -> str | None:
    if facts.scan is None:
        return None
    found = facts.scan
    if not found.damaged:
        return "all finite"
    where = listed(f"{name} ({n})" for name, n in found.damaged.items())
    return f"{found.nan} NaN and {found.inf} infinite values in {where}"


def _zero(facts: Facts) -> str | None:
    return None if facts.scan is None else listed(facts.scan.zero) or "no tensor"


def _or(value: object) -> str:
    return "?" if value is None else str(value)


# What a row shows, in this order; a row that says nothing of any model is left out.
FACTS: dict[str, Callable[[Facts], str | None]] = {
    "model": _kind,
    "revision": lambda f: f.revision,
    "head": lambda f: f.architecture.head,
    "labels": lambda f: listed(f.architecture.labels or ()),
    "layers": _layers,
    "vocabulary": _vocabulary,
    "positions": _positions,
    "parameters": _size,
    "stored": _storage,
    "adapts": lambda f: listed(f.adapter.targets) if f.adapter else None,
    "tokenizer": _tokenizer,
    "special tokens": _special,
    "comes from": _bases,
    "licence": _licence,
    "languages": lambda f: listed(f.card.languages),
    "training data": lambda f: listed(f.card.datasets),
    "task": lambda f: f.card.task,
    "card is silent on": lambda f: listed(f.card.silent, most=9),
    "values": _values,
    "all zero": _zero,
    "digest": lambda f: f.scan.digest if f.scan else None,
}
