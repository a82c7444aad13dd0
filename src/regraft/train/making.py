"""The contract of methods that make a model by running one: what recipes, commands and Python call alike.

    @maker(room="compress", summary="...", options=PelaOptions)
    def pela(work: Work[PelaOptions]) -> Made: ...

A maker opens the folders of its models itself, checks everything before it begins, and gives the model that it made;
who called it writes the folder. `check` looks at what can be known without running anything.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from regraft.checkpoint import open_checkpoint
from regraft.errors import UserError
from regraft.methods import Method, Options, Paper, register, validated

O = TypeVar("O", bound=Options)  # noqa: E741

Tell = Callable[[int, int, Mapping[str, float]], None]


def _untold(step: int, steps: int, figures: Mapping[str, float]) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Work(Generic[O]):
    """What a maker is given.

    Attributes:
        models: role ("model", "teacher") -> folder.
        options: resolved.
        data: file or folder, None where the step names none.
        folder: for checkpoints, so that a run that was stopped goes on.
        key: names the contents of models and data.
        device: "auto" or "cpu".
        tell: called after each step with (step, steps, figures).
        message: called with a line for the user.
    """

    models: Mapping[str, Path]
    options: O
    data: Path | None
    folder: Path
    key: str = ""
    device: str = "auto"
    tell: Tell = _untold
    message: Callable[[str], None] = lambda text: None


@dataclass
class Made:
    """What came out: the model, what was measured, and remarks."""

    model: Any
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Maker(Method, Generic[O]):
    """A registered maker.

    Attributes:
        roles: the models that it takes besides "model", each with whether it is needed.
        data: "needed", "optional" or "none".
        same_tensors: whether, with these options, the result has the tensors of "model", by name and shape.
        runs: how many runs of the loop these options ask for, at most; each leaves a checkpoint until all are done.
    """

    run: Callable[[Work[O]], Made]
    roles: Mapping[str, bool] = field(default_factory=dict)
    data: str = "needed"
    same_tensors: Callable[[Any], bool] = lambda options: True
    runs: Callable[[Any], int] = lambda options: 1

    def resolve(self, values: Mapping[str, Any], *, where: str = "") -> O:
        """Validated options.

        Raises:
            UserError: RG302 for an unknown option, RG303 for a value out of range.
        """
        return validated(self.name, self.options, values, where=where)  # type: ignore[return-value]

    def __call__(
        self,
        model: Path | str,
        *,
        data: Path | str | None = None,
        folder: Path | str,
        teacher: Path | str | None = None,
        device: str = "auto",
        tell: Tell | None = None,
        **options: Any,
    ) -> Made:
        """Make a model: `pela("bert", data="corpus.jsonl", folder="work", ratio=2, num_train_epochs=1).model`.

        Args:
            model, teacher: folders of saved models.
            data: what to train on.
            folder: for checkpoints.
            options: the method's options.

        Raises:
            UserError: for models, data and options that the method cannot take.
        """
        models = {"model": Path(model)} | ({"teacher": Path(teacher)} if teacher is not None else {})
        self.check(models, Path(data) if data is not None else None)
        given, resolved = Path(data) if data is not None else None, self.resolve(options)
        key = _content_key(self.name, models, resolved, given)
        return self.run(Work(models, resolved, given, Path(folder), key, device, tell or _untold))

    def check(self, models: Mapping[str, Any], data: Any, *, where: str = "") -> None:
        """Raise RG304 or RG601 if a model or the data is missing, RG302 for one that has no place here."""
        for role, needed in self.roles.items():
            if needed and role not in models:
                raise UserError("RG304", f"{self.name} needs a {role}", where=where, fix=f"add {role}: ...")
        for role in models:
            if role != "model" and role not in self.roles:
                raise UserError("RG302", f"{self.name} takes no {role}", where=where, fix="leave it out")
        if data is None and self.data == "needed":
            raise UserError("RG601", f"{self.name} needs data", where=where, fix="add data: ...")
        if data is not None and self.data == "none":
            raise UserError("RG302", f"{self.name} reads no data", where=where, fix="leave it out")


def _content_key(name: str, models: Mapping[str, Path], options: Options, data: Path | None) -> str:
    """Names what a run depends on, so that checkpoints and caches of another one in the same folder are not taken."""
    digests = {role: open_checkpoint(str(path)).digest() for role, path in models.items()}
    files = [] if data is None else sorted(data.rglob("*")) if data.is_dir() else [data]
    states = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    facts = [name, options.model_dump(mode="json"), digests, states]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def maker(
    *,
    room: str,
    summary: str,
    options: type[O],
    papers: tuple[Paper, ...] = (),
    roles: Mapping[str, bool] | None = None,
    data: str = "needed",
    same_tensors: Callable[[Any], bool] = lambda options: True,
    runs: Callable[[Any], int] = lambda options: 1,
) -> Callable[[Callable[[Work[O]], Made]], Maker[O]]:
    """Register a maker under the function's name."""

    def decorate(function: Callable[[Work[O]], Made]) -> Maker[O]:
        made: Maker[O] = Maker(
            name=function.__name__,
            room=room,
            summary=summary,
            options=options,
            papers=papers,
            doc=sys.modules[function.__module__].__doc__ or "",
            run=function,
            roles=roles or {},
            data=data,
            same_tensors=same_tensors,
            runs=runs,
        )
        register(made)
        return made

    return decorate


def chosen(options: Options, kind: type[O]) -> O:
    """The part of a method's options that belongs to a class it is made of."""
    return kind(**{name: getattr(options, name) for name in kind.model_fields})
