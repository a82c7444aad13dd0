"""`sweep: {density: [0.1, 0.2]}` in a step: one artefact per combination of values.

The members are called after their values as the recipe writes them (`merged@density=0.2`, several joined by commas), so
that later steps and folders can name them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from regraft.errors import nearest
from regraft.recipe.document import Condition, Setting
from regraft.recipe.fields import Field
from regraft.recipe.option_values import OptionReader

MAX_MEMBERS = 1000
_LONGEST = 60  # characters of a value in the name of a member


@dataclass(frozen=True)
class Member:
    """One combination: `suffix` is "" without a sweep; `settings` replace the step's own; `seed` too, if not None."""

    suffix: str = ""
    settings: dict[str, Setting] = field(default_factory=dict)
    seed: int | None = None
    values: dict[str, Any] = field(default_factory=dict)


def read_sweep(sweep: Field, reader: OptionReader, n: int, given_by_models: Collection[str]) -> list[Member]:
    """All members of a sweep, the last option varying fastest.

    Args:
        sweep: the mapping option -> list of values.
        reader: of the step's method.
        n: number of models besides the base.
        given_by_models: options that every model sets for itself, so that a value of the step never counts.

    Raises:
        UserError: RG302 for an option that the method does not have, RG303 for values.
    """
    columns: list[list[tuple[str, str, Any]]] = []
    known = [*reader.names, "seed"]
    for name, item in sweep.items("a mapping: an option and the list of its values").items():
        if name not in known:
            what = f"{reader.method.name} has no option {name!r} to sweep"
            raise item.error("RG302", what, nearest(name, known))
        if name in given_by_models:
            what = f"every model sets its own {name}, so that sweeping it changes nothing"
            raise item.error("RG303", what, f"remove {name} from the models")
        column: list[tuple[str, str, Any]] = []
        labels: set[str] = set()
        entries = item.entries("a list of values")
        if len(entries) > MAX_MEMBERS:
            raise item.error("RG303", f"the sweep has {len(entries):,} members or more", f"keep to {MAX_MEMBERS:,}")
        for entry in entries:
            label = _label(entry)
            if len(label) > _LONGEST:
                what = f"{name} has a value that is too long for the name of a model"
                raise entry.error("RG303", what, f"write it in {_LONGEST} characters, or make a step of its own")
            if label in labels:
                raise entry.error("RG303", f"{name} has the value {label} twice", "remove one")
            labels.add(label)
            if name == "seed":
                column.append((name, label, entry.integer(0, 2**63 - 1)))
            else:
                column.append((name, label, reader.setting(name, entry, n)))
        columns.append(column)
    if not columns:
        raise sweep.error("RG303", "the sweep names no option", "write sweep: {option: [values]}")
    count = 1
    for column in columns:
        count *= len(column)
    if count > MAX_MEMBERS:
        raise sweep.error("RG303", f"the sweep has {count:,} members", f"keep to {MAX_MEMBERS:,}, or use several steps")
    return [_member(combination) for combination in itertools.product(*columns)]


def _member(combination: tuple[tuple[str, str, Any], ...]) -> Member:
    suffix = "@" + ",".join(f"{name}={label}" for name, label, _ in combination)
    settings = {name: value for name, _, value in combination if name != "seed"}
    seed = next((value for name, _, value in combination if name == "seed"), None)
    values = {n: v if n == "seed" else _plain(v) for n, _, v in combination}
    return Member(suffix, settings, seed, values)


def _plain(setting: Setting) -> Any:
    if len(setting) == 1 and setting[0].filter is None:
        return setting[0].value
    return [_entry(condition) for condition in setting]


def _entry(condition: Condition) -> dict[str, Any]:
    return {"value": condition.value} if condition.filter is None else vars(condition)


def _label(entry: Field) -> str:
    """A value within a name: `0.2`, `0.1_0.9` for a gradient."""
    if entry.is_list:
        return "_".join(_label(e) for e in entry.entries())
    if entry.is_mapping:
        return "_".join(_label(e) for e in entry.items().values())
    return re.sub(r"[^\w.+-]+", "-", entry.node.text) or "null"
