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

import torch
from pydantic import BeforeValidator, ValidationError

from regraft.checkpoint.dtypes import DTYPES, dtype_name
from regraft.checkpoint.tensor import BLOCK, StoredRows
from regraft.errors import UserError, nearest
from regraft.merge.kernels import Values, differences, widened
from regraft.methods import Method, Options, Paper, register

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from regraft.axes import Layout
    from regraft.merge.statistics import Statistic

T = TypeVar("T")
V = TypeVar("V")
O = TypeVar("O", bound=Options)  # noqa: E741


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


@dataclass(frozen=True)
class TensorInfo:
    """What a rule may know of a tensor beside its values.

    `layer` counts from 0 at the input within its `stack` of `num_layers` ("" for the only stack, else "encoder",
    "decoder", "vision", ...); None outside the layers. `role` is "embedding", "head", "norm" or "". A matrix is
    (outputs, inputs), or (inputs, outputs) if it is `transposed`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    num_layers: int | None = None
    stack: str = ""
    role: str = ""
    transposed: bool = False

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def width(self) -> int:
        """Elements per row: all axes but the first, or the whole of a vector."""
        return max(self.numel // self.shape[0], 1) if len(self.shape) > 1 and self.shape[0] else max(self.numel, 1)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes and is no embedding, head, norm or buffer."""
        return len(self.shape) == 2 and not self.role

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], layout: Layout) -> TensorInfo:
        """The tensor `name` of a model with this layout. Outside the layers `num_layers` is that of its stack."""
        place = layout.place(name)
        depth = place.num_layers or layout.stacks.get(place.stack) or next(iter(layout.stacks.values()), None)
        return cls(name, shape, place.layer, depth, place.stack, place.role, place.transposed)


class Chunk(Generic[O]):
    """Elements `[start, start + L)` of one tensor, in every model, in the arithmetic dtype (float32 or float64).

    Args:
        rows: one row of shape (L,) per model and, if `has_base`, the base's last: of any float dtype as they are
            stored, or as a tensor (n, L), or tensors of several dtypes.
        arithmetic: the arithmetic dtype, "F32" or "F64"; that of `rows` by default.
        block: chunks of this tensor start at multiples of so many elements; what is summed up over a tensor is summed
            over blocks first, so that cutting does not matter.
    """

    def __init__(
        self,
        info: TensorInfo,
        options: O,
        start: int,
        rows: StoredRows | Sequence[Tensor] | Tensor,
        has_base: bool = False,
        arithmetic: str | None = None,
        block: int = BLOCK,
    ) -> None:
        self.info, self.options, self.start, self.has_base = info, options, start, has_base
        self.stored = rows if isinstance(rows, StoredRows) else None
        self._rows = None if isinstance(rows, StoredRows) else rows
        self.n, self.length = len(rows) - has_base, _length(rows)
        self.arithmetic = arithmetic or (rows.dtype if isinstance(rows, StoredRows) else dtype_name(rows[0].dtype))
        self.block = block
        self._base: Tensor | None = None
        self._models: Tensor | None = None
        self._deltas: Tensor | None = None
        self._computed: dict[Any, Any] = {}

    @property
    def rows(self) -> Tensor | Sequence[Tensor]:
        """What was read of the models, then of the base, in the dtypes of the files: (n, L), or a tensor for each."""
        if self._rows is None:
            assert self.stored is not None
            self._rows = self.stored.tensor
        return self._rows

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic dtype."""
        return DTYPES[self.arithmetic]

    @property
    def device(self) -> torch.device:
        return self.rows[0].device

    @property
    def base(self) -> Tensor:
        """The base's elements, shape (L,). Treat as read-only."""
        if not self.has_base:
            raise AttributeError("this merge has no base model")
        if self._base is None:
            self._base = widened(self.rows[self.n : self.n + 1], self.dtype)[0]
        return self._base

    @property
    def models(self) -> Tensor:
        """All models' elements, shape (n, L). Treat as read-only."""
        if self._models is None:
            self._models = widened(self.rows[: self.n], self.dtype)
        return self._models

    @property
    def deltas(self) -> Tensor:
        """Task vectors `models - base`, shape (n, L), formed after upcasting. Treat as read-only."""
        if self._deltas is None:
            self._deltas = differences(self.rows[: self.n], self.base)
        return self._deltas

    def computed(self, f: Callable[[Chunk[O]], V]) -> V:
        """`f(self)`, computed once: several statistics may be about the same values. Treat as read-only."""
        if f not in self._computed:
            self._computed[f] = f(self)
        found: V = self._computed[f]
        return found

    def per_model(self, values: Sequence[float]) -> Tensor:
        """One number per model as a column (n, 1), in the arithmetic dtype."""
        return self.like(values).unsqueeze(1)

    def like(self, values: Sequence[float] | np.ndarray) -> Tensor:
        """Numbers, such as a statistic's result, as a tensor in the arithmetic dtype, on this chunk's device."""
        return torch.as_tensor(values, dtype=self.dtype, device=self.device)

    def random_bits(self, seed: int, model: int) -> Tensor:
        """Uniform int32 for each element, shape (L,): a function of (seed, model, tensor name, element) alone."""
        from regraft.merge.random import bits

        return bits(seed, model, self.info.name, self.start, self.length, self.device)


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


def _length(rows: StoredRows | Sequence[Tensor] | Tensor) -> int:
    return int((rows.array if isinstance(rows, StoredRows) else rows[0]).shape[-1])


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
