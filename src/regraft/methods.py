"""The registry: every method says its name, its paper and its options, in the file that implements it.

A room (a sub-package such as `regraft.merge.rules`) is imported when somebody asks for one of its methods; importing
a method's file registers it. Nothing else has to be edited to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from regraft.errors import UserError, nearest

# Verb of a recipe's step -> the package whose files hold its methods.
ROOMS = {
    "merge": "regraft.merge.rules",
    "compress": "regraft.resize.methods",
    "train": "regraft.train.methods",
    "evaluate": "regraft.inspect.metrics",
}


class Options(BaseModel):
    """Base of all option classes: typed, bounded, described fields; unknown names are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )


@dataclass(frozen=True)
class Paper:
    """A paper that a method implements.

    Attributes:
        number: the paper's number among the 84 that define regraft's scope, or 0 for others.
        title, authors, venue: as one would cite it; `arxiv` is the id, such as "2306.01708" (may be empty).
    """

    title: str
    authors: str
    venue: str
    arxiv: str = ""
    number: int = 0

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def cite(self) -> str:
        parts = [self.authors, f'"{self.title}"', self.venue, f"arXiv:{self.arxiv}" if self.arxiv else ""]
        return ", ".join(p for p in parts if p)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every method of every room tells about itself."""

    name: str
    room: str  # the verb of a recipe's step: merge, evaluate, ...
    summary: str  # one sentence, without a full stop
    options: type[Options]
    papers: tuple[Paper, ...] = ()
    doc: str = ""  # the module's docstring: what it does, where it departs from the paper and why


_REGISTRY: dict[str, dict[str, Any]] = {room: {} for room in ROOMS}


def register(method: Method) -> None:
    """Enter a method; called by the decorators of each room (`regraft.merge.rule`, ...)."""
    _REGISTRY[method.room][method.name] = method


def methods(room: str | None = None) -> list[Any]:
    """All methods of a room, or of all rooms, sorted by name."""
    found: list[Any] = []
    for verb, package in ROOMS.items():
        if room in (None, verb):
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
            found += [_REGISTRY[verb][name] for name in sorted(_REGISTRY[verb])]
    return found


def method(room: str, name: str, *, where: str = "") -> Any:
    """The method `name` of a room.

    Raises:
        UserError: RG301 with the nearest name, if there is none.
    """
    known = {m.name: m for m in methods(room)}
    if name not in known:
        raise UserError("RG301", f"unknown {room} method {name!r}", where=where, fix=nearest(name, known))
    return known[name]


O = TypeVar("O", bound=Options)  # noqa: E741


def validated(name: str, options: type[O], values: Mapping[str, Any], *, where: str = "") -> O:
    """The options of the method `name`, from values that a user gives.

    Raises:
        UserError: RG302 for an unknown option, RG303 for a value out of range.
    """
    for option in values:
        if option not in options.model_fields:
            fix = nearest(option, options.model_fields)
            raise UserError("RG302", f"{name} has no option {option!r}", where=where, fix=fix)
    try:
        return options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        wrong = ".".join(str(part) for part in first["loc"])
        what = f"{wrong} is {first['input']!r}: {message[0].lower()}{message[1:]}" if wrong else message
        raise UserError("RG303", what, where=where or name, fix=f"change {wrong or 'the options'}") from None
