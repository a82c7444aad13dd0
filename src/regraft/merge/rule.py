"""The contract of a merge rule: how one file turns the same tensor of several models into one.

A rule is a function of a `Unit` (what it decides on at once: one tensor, or the whole model) that returns how to
combine a `Chunk`, a slice of that tensor in all models. If it needs a number that depends on the whole tensor, it
asks for it by `yield`, and reads top to bottom all the same:

    @rule(summary="move along the difference, capped at its median", options=CappedOptions, needs_base=True)
    def capped(unit: Unit[CappedOptions]) -> Steps:
        (limits,) = yield [OrderStatistic(lambda c: c.deltas.abs(), ranks=[unit.numel // 2])]

        def combine(c: Chunk[CappedOptions]) -> Tensor:
            cap = c.like(limits)
            return c.base + c.deltas.clamp(-cap, cap).mean(0)

        return combine

The engine streams the tensors once per sweep that the statistics need, then once to combine. A rule never sees a
file, a recipe or an architecture's parameter names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeAlias, TypeVar

from pydantic import BeforeValidator, ValidationError

from regraft.errors import UserError, nearest
from regraft.merge.chunk import Chunk, O, TensorInfo
from regraft.merge.kernels import Values
from regraft.methods import Method, Options, Paper, register

if TYPE_CHECKING:
    import numpy as np

    from regraft.merge.statistics import Statistic

T = TypeVar("T")


class _PerModel:
    """Marks an option that has one value per model (a scalar stands for all of them)."""


PER_MODEL = _PerModel()


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


# `weight: PerModel[float]`: after validation a tuple with one entry per model.
PerModel = Annotated[tuple[T, ...], BeforeValidator(_as_tuple), PER_MODEL]


class _OneModel:
    """Marks an option that is one of the models: in a recipe by its name, in Python by its place among them, from 0."""


ONE_MODEL = _OneModel()

# `task: OneModel = Field(None, ge=0, description=...)`: None for none of them.
OneModel = Annotated[int | None, ONE_MODEL]


def one_model_fields(options: type[Options]) -> set[str]:
    """Names (aliases, as users write them) of the options that are one of the models."""
    return {f.alias or name for name, f in options.model_fields.items() if ONE_MODEL in f.metadata}


def per_model_fields(options: type[Options]) -> set[str]:
    """Names (aliases, as users write them) of the options that have one value per model."""
    return {f.alias or name for name, f in options.model_fields.items() if PER_MODEL in f.metadata}


def field_names(options: type[Options]) -> dict[str, str]:
    """Public name of each option (`lambda`) -> attribute (`lambda_`)."""
    return {f.alias or name: name for name, f in options.model_fields.items()}


@dataclass
class Unit(Generic[O]):
    """What a rule decides on at once. `options` holds the values of the first tensor; in scope "model" the engine has
    checked that the options listed in the rule's `model_wide` are the same for all."""

    infos: tuple[TensorInfo, ...]
    n: int
    options: O
    has_base: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(info.numel for info in self.infos)

    @property
    def name(self) -> str:
        return self.infos[0].name if len(self.infos) == 1 else "the whole model"

    def note(self, **facts: Any) -> None:
        """Facts for the lineage file: thresholds, realised densities, which branch ran."""
        self.notes.update(facts)

    def warn(self, message: str) -> None:
        """One sentence for the user; the run goes on."""
        self.warnings.append(message)


@dataclass(frozen=True)
class Copy:
    """The result is this model's tensor bit for bit: no arithmetic, the other models are not read."""

    model: int


# A tensor (L,) in the arithmetic dtype; or such an array, from the compiled loops.
Combine: TypeAlias = Callable[[Chunk[Any]], Values]
# What a rule asks for by `yield` comes as arrays.
Steps: TypeAlias = Generator["Sequence[Statistic]", "Sequence[np.ndarray]", "Combine | Copy"]


@dataclass(frozen=True, kw_only=True)
class Rule(Method, Generic[O]):
    """A registered merge rule. Calling it merges tensors or state dicts in memory, by the engine that merges files."""

    function: Callable[[Unit[O]], Steps | Combine | Copy]
    needs_base: bool = False
    takes_base: bool = False  # reads the base where there is one
    base_first: bool = False  # has no base, but a recipe may call the first of its models so
    min_models: int = 1
    max_models: int | None = None
    scope: Callable[[O], str] = lambda _: "tensor"  # "tensor" or "model"
    model_wide: tuple[str, ...] = ()  # options that must not vary between tensors in scope "model"
    # What a chunk must not cut: "elements", "rows" (all axes but the first; a vector is one row), "matrices" (whole
    # ones, while other tensors are cut anywhere) or "tensor". Rules that need whole tensors hold as many of them in
    # memory as there are workers.
    span: Callable[[O], str] = lambda _: "elements"
    rows_beside: int = 0  # tensors of a chunk's length that it holds beside those per model, for the estimate of memory
    order_statistics: int = 0  # most that it asks for at once of each model, for the estimate of memory
    # Whether, for the options, compiled loops serve it from the first sweep to the last on the processor, if models are
    # of bfloat16 or float32. The command line does without torch then.
    compiled: Callable[[O], bool] = lambda _: False
    # The rule as a fixed combination base + Σ cᵢ (θᵢ - base), if it is one: c for the options, None where they make it
    # none. Adapters are then merged without their models.
    combination: Callable[[O], Sequence[float] | None] | None = None
    # What the same words mean in a mergekit recipe: defaults that differ (REQUIRED: no default) ...
    mergekit_defaults: Mapping[str, Any] = field(default_factory=dict)
    # ... and values that are spelt otherwise, {option: {their value: ours}}.
    mergekit_values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    in_mergekit: bool = True

    def resolve(self, n: int, values: Mapping[str, Any], *, where: str = "") -> O:
        """Validated options for `n` models, one entry per model where an option has one.

        Raises:
            UserError: RG302 for an unknown option, RG303 for a value out of range, RG305 for a wrong number of models.
        """
        self.check_count(n, where=where)
        public = field_names(self.options)
        for name in values:
            if name not in public and name not in public.values():
                raise UserError("RG302", f"{self.name} has no option {name!r}", where=where, fix=nearest(name, public))
        spread = {}
        per_model, one_of = per_model_fields(self.options), one_model_fields(self.options)
        for public_name, attribute in public.items():
            given = values.get(public_name, values.get(attribute, _ABSENT))
            if public_name in per_model:
                if given is _ABSENT:
                    given = self.options.model_fields[attribute].get_default(call_default_factory=True)
                if given is _ABSENT or given is None:
                    continue
                given = _as_tuple(given)
                if len(given) not in (1, n):
                    what = f"{public_name} has {len(given)} values for {n} models"
                    raise UserError("RG303", what, where=where, fix="give one number, or one per model")
                given = given * n if len(given) == 1 else given
            if given is not _ABSENT:
                spread[public_name] = given
            if public_name in one_of and isinstance(given, int) and given >= n:
                what = f"{public_name} is {given}, and there are {n} models, counted from 0"
                raise UserError("RG303", what, where=where or self.name, fix=f"give a number below {n}")
        try:
            return self.options(**spread)  # type: ignore[return-value]
        except ValidationError as error:
            first = error.errors()[0]
            detail = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:  # about several options
                raise UserError("RG303", detail, where=where or self.name, fix="change one of them") from None
            option = str(first["loc"][0])
            if first["type"] == "missing":
                raise UserError(
                    "RG303", f"{self.name} needs {option!r}", where=where, fix=f"add {option}: ..."
                ) from None
            what = f"{option} is {first['input']!r}: {detail[0].lower()}{detail[1:]}"
            raise UserError("RG303", what, where=where or self.name, fix=f"change {option}") from None

    @property
    def reads_base(self) -> bool:
        """Whether a base that a recipe names is one, and not just another of the models."""
        return self.needs_base or self.takes_base

    def check_count(self, n: int, *, where: str = "") -> None:
        """Raise RG305 unless the rule takes `n` models (besides the base)."""
        high = self.max_models
        if n < self.min_models or (high is not None and n > high):
            want = f"{self.min_models} or more" if high is None else str(self.min_models)
            if high is not None and high > self.min_models:
                want = f"{self.min_models} to {high}"
            beside = " besides the base" if self.needs_base else ""
            raise UserError(
                "RG305", f"{self.name} takes {want} model(s){beside}, not {n}", where=where, fix="change models"
            )

    def start(self, unit: Unit[O]) -> Steps:
        """The rule's steps as a generator, also for rules that need no statistics."""
        result = self.function(unit)
        if isinstance(result, Generator):
            return result
        return _no_statistics(result)

    def __call__(
        self,
        models: Sequence[Any],
        base: Any = None,
        *,
        workers: int = 1,
        chunk: int | None = None,
        allow_nan: bool = False,
        device: str = "cpu",
        **options: Any,
    ) -> Any:
        """Merge tensors, or state dicts, in memory.

        Args:
            models: tensors of one shape, or mappings name -> tensor with the same names and shapes.
            base: the same kind of thing, where the rule has a base.
            workers, chunk: threads and elements per chunk; they never change the result.
            allow_nan: merge values that are not finite instead of raising RG206.
            device: where to compute, "cpu" or "cuda"; elsewhere than on the CPU the last bits may differ.
            options: the rule's options; those with one value per model take a number or a list.

        Returns:
            A tensor, or a dict name -> tensor, in the dtype of the base (or of the first model).

        Raises:
            UserError: for options, counts, shapes and values that the rule cannot take.
        """
        from regraft.merge.memory import merge_in_memory

        return merge_in_memory(
            self, models, base, options, workers=workers, chunk=chunk, allow_nan=allow_nan, device=device
        )


_ABSENT: Any = object()
REQUIRED: Any = "required"


def _no_statistics(result: Combine | Copy) -> Steps:
    return result
    yield


def rule(
    *,
    summary: str,
    options: type[O],
    papers: Sequence[Paper] = (),
    name: str | None = None,
    **settings: Any,
) -> Callable[[Callable[[Unit[O]], Any]], Rule[O]]:
    """Register a merge rule; the decorated function becomes a callable `Rule`. See the module's docstring."""

    def decorate(function: Callable[[Unit[O]], Any]) -> Rule[O]:
        registered: Rule[O] = Rule(
            name=name or function.__name__,
            room="merge",
            summary=summary,
            options=options,
            papers=tuple(papers),
            doc=sys.modules[function.__module__].__doc__ or "",
            function=function,
            **settings,
        )
        register(registered)
        return registered

    return decorate
