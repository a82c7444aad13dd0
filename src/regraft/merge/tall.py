"""TALL masks (arXiv:2405.07813): which entries of a merged task vector each task needs, and the rules made of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import torch
from pydantic import Field, model_validator

from regraft.merge.consensus import Density, TaskVectorOptions, changed, elected, total
from regraft.merge.rule import Chunk, Combine, OneModel, PerModel, Unit, rule
from regraft.merge.sparsify import largest
from regraft.merge.statistics import Statistic
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from typing_extensions import Self

Merged: TypeAlias = Callable[[Chunk[Any]], "Tensor"]  # a chunk -> the merged task vector that masks choose from, (L,)

tall_rule = partial(
    rule,
    needs_base=True,
    in_mergekit=False,
    papers=[
        Paper(
            "Localizing Task Information for Improved Model Merging and Compression",
            "Wang et al.",
            "ICML 2024",
            "2405.07813",
        )
    ],
)
tall_ties_rule = partial(tall_rule, scope=lambda _: "model", order_statistics=1, model_wide=("density",))


class MaskOptions(TaskVectorOptions):
    tall_mask_lambda: PerModel[Annotated[float, Field(gt=0)]] = Field(
        (0.4,),
        description="an entry is in a task's mask if it is farther from the base than so many times from the merge",
    )


class TaskMaskOptions(MaskOptions):
    task: OneModel = Field(None, ge=0, description="the model whose task the result is for; without it, for all")


class ConsensusOptions(MaskOptions):
    k: int = Field(2, ge=0, description="how many tasks' masks an entry must be in to be kept, at most all")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if len(self.weight) > 1 and self.k > len(self.weight):
            raise ValueError(f"no entry can be in {self.k} masks of {len(self.weight)} tasks")
        return self


class TrimOptions(Options):
    density: PerModel[Density] = Field(
        (0.2,), description="share of each task vector that TIES keeps, over the whole model, in (0, 1]"
    )


def summed(c: Chunk[Any]) -> Tensor:
    """The merged task vector of task arithmetic."""
    return total(c.deltas, c.options.weight, False)


def trimmed_and_elected(unit: Unit[Any]) -> Generator[Sequence[Statistic], Sequence[np.ndarray], Merged]:
    """A stage that gives the merged task vector of TIES: trimmed, and the entries of the elected sign summed."""
    sparse = yield from largest(unit, unit.options.density)
    return lambda c: elected(sparse(c), c.options.weight, False)


def of_task(merged: Merged) -> Combine:
    """The last pass: the merged task vector where the mask of the task in question has it, or all of it."""

    def combine(c: Chunk[Any]) -> Tensor:
        o, change = c.options, merged(c)
        if o.task is not None:
            mask = _needed(c.deltas[o.task], change, o.tall_mask_lambda[o.task])
            change = torch.where(mask, change, torch.zeros_like(change))
        return changed(c.base, change, o.lambda_)

    return combine


def of_consensus(merged: Merged) -> Combine:
    """The last pass: the merged task vector where the masks of at least k tasks have it."""

    def combine(c: Chunk[Any]) -> Tensor:
        o, change = c.options, merged(c)
        votes = torch.zeros_like(change, dtype=torch.int32)
        for delta, factor in zip(c.deltas, o.tall_mask_lambda, strict=True):
            votes += _needed(delta, change, factor)
        return changed(c.base, torch.where(votes >= o.k, change, torch.zeros_like(change)), o.lambda_)

    return combine


def _needed(delta: Tensor, merged: Tensor, factor: float) -> Tensor:
    """A task's mask, (L,): where its fine-tune is farther from the base than from the merge, times the factor."""
    return delta.abs() > (merged - delta).abs() * factor
