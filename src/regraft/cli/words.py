"""Numbers and options as people read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from regraft.inspect.words import size_in_words as size_in_words


def value_in_words(value: Any) -> str:
    """A value of an option, short: floats with six digits, lists in brackets."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {value_in_words(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(value_in_words(v) for v in value)}]"
    return str(value)


def options_in_words(options: Mapping[str, Any], models: Sequence[str], per_model: Collection[str]) -> str:
    """`weight a=0.3 b=0.7, density 0.2, normalize yes`: what all models share is said once."""
    parts = []
    for name, value in options.items():
        if name in per_model and isinstance(value, (list, tuple)):
            same = len({repr(v) for v in value}) == 1
            if same:
                parts.append(f"{name} {value_in_words(value[0])}")
            elif len(value) == len(models):
                each = " ".join(f"{m}={value_in_words(v)}" for m, v in zip(models, value, strict=True))
                parts.append(f"{name} {each}")
            else:
                parts.append(f"{name} {' '.join(value_in_words(v) for v in value)}")
        else:
            parts.append(f"{name} {value_in_words(value)}")
    return ", ".join(parts)
