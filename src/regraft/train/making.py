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
from collections.abc import Callable, Mapping, Sequence
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
        models: role ("model", "teacher") -> folder; several of a role are "teacher", "teacher_2", ...
        options: resolved.
        data: file or folder, None where the step names none.
        sources: further data by name, as far as it is given.
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
    sources: Mapping[str, Path] = field(default_factory=dict)


@dataclass
class Made:
    """What came out: the model, or an adapter for it (a PEFT model), what was measured, and remarks.

    `files` go beside the model (name -> text).
    """

    model: Any
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    adapter: Any | None = None


@dataclass(frozen=True, kw_only=True)
class Maker(Method, Generic[O]):
    """A registered maker.

    Attributes:
        roles: the models that it takes besides "model", each with whether it is needed.
        several: the roles that more than one model may have.
        data: "needed", "optional" or "none".
        sources: further data files that it may be given, by the key of a step, with what each is.
        same_tensors: whether, with these options, the result has the tensors of "model", by name and shape.
        adapter: whether, with these options, the result is an adapter for "model".
        runs: how many runs of the loop these options ask for, at most; each leaves a checkpoint until all are done.
    """

    run: Callable[[Work[O]], Made]
    roles: Mapping[str, bool] = field(default_factory=dict)
    several: frozenset[str] = frozenset()
    data: str = "needed"
    sources: Mapping[str, str] = field(default_factory=dict)
    same_tensors: Callable[[Any], bool] = lambda options: True
    adapter: Callable[[Any], bool] = lambda options: False
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
        teacher: Path | str | Sequence[Path | str] | None = None,
        device: str = "auto",
        tell: Tell | None = None,
        **options: Any,
    ) -> Made:
        """Make a model: `pela("bert", data="corpus.jsonl", folder="work", ratio=2, num_train_epochs=1).model`.

        Args:
            model, teacher: folders of saved models; a list where the method takes several teachers.
            data: what to train on.
            folder: for checkpoints.
            options: the method's options, and its further data by name.

        Raises:
            UserError: for models, data and options that the method cannot take.
        """
        sources = {name: Path(options.pop(name)) for name in self.sources if options.get(name) is not None}
        taught_by = [] if teacher is None else [teacher] if isinstance(teacher, str | Path) else list(teacher)
        names = roles_for("teacher", len(taught_by))
        models = {"model": Path(model)} | dict(zip(names, map(Path, taught_by), strict=True))
        self.check(models, Path(data) if data is not None else None)
        given, resolved = Path(data) if data is not None else None, self.resolve(options)
        key = _content_key(self.name, models, resolved, given, sources)
        return self.run(Work(models, resolved, given, Path(folder), key, device, tell or _untold, sources=sources))

    def check(self, models: Mapping[str, Any], data: Any, *, where: str = "") -> None:
        """Raise RG304 or RG601 if a model or the data is missing, RG302 for one that has no place here."""
        for role, needed in self.roles.items():
            if needed and role not in models:
                raise UserError("RG304", f"{self.name} needs a {role}", where=where, fix=f"add {role}: ...")
        for role in models:
            head, _, number = role.rpartition("_")
            known = head if head in self.several and number.isdecimal() else role
            if known != "model" and known not in self.roles:
                raise UserError("RG302", f"{self.name} takes no {role}", where=where, fix="leave it out")
        if data is None and self.data == "needed":
            raise UserError("RG601", f"{self.name} needs data", where=where, fix="add data: ...")
        if data is not None and self.data == "none":
            raise UserError("RG302", f"{self.name} reads no data", where=where, fix="leave it out")


def roles_for(role: str, count: int) -> list[str]:
    """The roles of several models of one kind: teacher, teacher_2, teacher_3."""
    return [role if i == 0 else f"{role}_{i + 1}" for i in range(count)]


def _content_key(
    name: str, models: Mapping[str, Path], options: Options, data: Path | None, sources: Mapping[str, Path]
) -> str:
    """Names what a run depends on, so that checkpoints and caches of another one in the same folder are not taken."""
    digests = {role: open_checkpoint(str(path)).digest() for role, path in models.items()}
    states = []
    for place in (*([] if data is None else [data]), *sources.values()):
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        states.append([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()])
    facts = [name, options.model_dump(mode="json"), digests, sorted(sources), states]
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def maker(
    *,
    room: str,
    summary: str,
    options: type[O],
    papers: tuple[Paper, ...] = (),
    roles: Mapping[str, bool] | None = None,
    several: frozenset[str] = frozenset(),
    data: str = "needed",
    sources: Mapping[str, str] | None = None,
    same_tensors: Callable[[Any], bool] = lambda options: True,
    adapter: Callable[[Any], bool] = lambda options: False,
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
            several=several,
            data=data,
            sources=sources or {},
            same_tensors=same_tensors,
            adapter=adapter,
            runs=runs,
        )
        register(made)
        return made

    return decorate


def chosen(options: Options, kind: type[O]) -> O:
    """The part of a method's options that belongs to a class it is made of."""
    return kind(**{name: getattr(options, name) for name in kind.model_fields})
