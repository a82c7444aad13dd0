"""The contract of a metric: a model's folder and a data file in, one score with an interval out.

    @metric(summary="share of rows whose predicted label is right", options=AccuracyOptions)
    def accuracy(model: Path, data: Path, options: AccuracyOptions) -> Score:
        ...

A metric reads rows as a stream, computes in batches and keeps no more than one batch of model outputs, so data of any
length can be scored. It loads the model as `transformers` does, and never runs code from the model's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from regraft.errors import UserError
from regraft.methods import Method, Options, Paper, register, validated


class Answer(BaseModel):
    """What a model makes of one input, in words; some metrics keep these beside the number.

    Attributes:
        input: the input in words: its text, or the name of its file or row.
        output: the label's name, the text that was written, the filling of the gap, or the nearest other input.
        value: how sure the model is, from 0 to 1; for encoders a cosine, from -1 to 1. None where there is no output.
        truth: the row's label in words, None where it has none.
        right: whether the output is the true one, None where there is no label.
        alternatives: the outputs that came next, each with its value, best first.
        remarks: what is odd about the output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str
    output: str
    value: float | None = None
    truth: str | None = None
    right: bool | None = None
    alternatives: tuple[tuple[str, float], ...] = ()
    remarks: tuple[str, ...] = ()
    notes: dict[str, Any] = Field(default_factory=dict)


class Score(BaseModel):
    """What a metric found.

    Attributes:
        value: the score, in the unit of `metric`.
        higher_is_better: which way is up.
        n: how many things were scored (rows, pairs or tokens: see `unit`).
        unit: what `n` counts.
        interval: 95 % interval of `value`, or None where there is too little data for one.
        per_group: the same, for the rows of each group, in the order in which the groups appear.
        notes: facts that belong to the number: how many texts were cut, the label names, ...
        answers: what the model made of each input, from metrics that look at a few inputs one by one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    higher_is_better: bool = True
    n: int
    unit: str = "rows"
    interval: tuple[float, float] | None = None
    per_group: dict[str, Score] = Field(default_factory=dict)
    notes: dict[str, Any] = Field(default_factory=dict)
    answers: tuple[Answer, ...] = ()


class MetricOptions(Options):
    """Options that every metric has."""

    group: str | None = Field(
        None, description="column that names each row's group; by default 'group' if there is one"
    )
    split: str | None = Field(None, description="split to take from a folder that holds several, such as test")
    limit: int | None = Field(None, ge=1, description="score only this many rows, from the start")
    batch_size: int = Field(64, ge=1, description="rows (or windows of tokens) per forward pass")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU if there is one")


O = TypeVar("O", bound=MetricOptions)  # noqa: E741


@dataclass(frozen=True, kw_only=True)
class Metric(Method, Generic[O]):
    """A registered metric.

    `score(model folder, data, options)` measures; `check(data, options)` looks at the first row only and raises what
    `score` would raise for missing files, unknown formats and missing columns, so that a plan can be refused early.
    `files` names the options that hold paths of further data; in recipes these are relative to the recipe, like `data`.
    `data` tells whether there must be data; where there is none, `score` and `check` are given None.
    """

    score: Callable[[Path, Any, O], Score]
    check: Callable[[Any, O], None]
    papers: tuple[Paper, ...] = field(default=())
    files: tuple[str, ...] = ()
    data: Literal["needed", "optional"] = "needed"

    def resolve(self, values: Mapping[str, Any], *, where: str = "") -> O:
        """Validated options.

        Raises:
            UserError: RG302 for an unknown option, RG303 for a value out of range.
        """
        return validated(self.name, self.options, values, where=where)  # type: ignore[return-value]

    def __call__(self, model: Path | str, data: Path | str | None = None, **options: Any) -> Score:
        """Measure a model: `accuracy("out/merged", "test.jsonl", limit=100)`.

        Args:
            model: folder of a saved model.
            data: file or folder of data; may be left out for metrics that bring their own.
            options: the metric's options.

        Raises:
            UserError: for options, data or a model that the metric cannot take.
        """
        if data is None and self.data == "needed":
            raise UserError("RG601", f"{self.name} needs data", fix="name a data file")
        return self.score(Path(model), None if data is None else Path(data), self.resolve(options))


def metric(
    *,
    summary: str,
    options: type[O],
    check: Callable[[Any, O], None],
    papers: tuple[Paper, ...] = (),
    files: tuple[str, ...] = (),
    data: Literal["needed", "optional"] = "needed",
) -> Callable[[Callable[[Path, Any, O], Score]], Metric[O]]:
    """Register a metric under the function's name. See the module's docstring."""

    def decorate(function: Callable[[Path, Any, O], Score]) -> Metric[O]:
        registered: Metric[O] = Metric(
            name=function.__name__,
            room="evaluate",
            summary=summary,
            options=options,
            papers=papers,
            doc=sys.modules[function.__module__].__doc__ or "",
            score=function,
            check=check,
            files=files,
            data=data,
        )
        register(registered)
        return registered

    return decorate
