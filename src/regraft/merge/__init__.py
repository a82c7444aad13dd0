"""Merge rules as functions on tensors and state dicts: `regraft.merge.ties([a, b], base=base, density=0.2)`.

Every registered rule is an attribute of this package; `regraft methods` lists them. Rules live in `rules/`, one file
each; `rule.py` is their contract, `engine.py` runs them.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from regraft.methods import methods

    rules = {rule.name: rule for rule in methods("merge")}
    if name not in rules:
        raise AttributeError(f"{__name__!r} has no rule {name!r}; there are {', '.join(rules)}")
    return rules[name]


def __dir__() -> list[str]:
    from regraft.methods import methods

    return [*globals(), *(rule.name for rule in methods("merge"))]
