"""EMR-Merging: elect one task vector for all tasks, then mask and rescale it for each.

    γ  = sign Σᵢ δᵢ                              elect, per entry: the sign that most of the size has,
    τ  = γ · max |δᵢ| over those of that sign       and the largest change that has it
    mₜ = 1 where δₜ has the elected sign          mask, per task
    rₜ = Σ |δₜ| / Σ |mₜ τ|                         rescale, one number per task over the whole model
    θ₀ + λ τ  is the unified model;   θ₀ + λ rₜ mₜ τ  is that of task t

Use it when the task of an input is known when the model is chosen: with `task` the result is that task's model as the
unified one gives it back. What a task needs beside the base and the unified model is one bit per entry and one number;
`sweep: {task: [maths, code]}` writes one model for each. Without `task` the result is the unified model, the largest
change of every entry, which is meant to be masked; where there can be only one model, use `ties`.

Where they differ, `rescaler: sum` is the paper's and `tensor_means` the official code's and FusionBench's: there the
two sizes are sums over tensors of each one's mean, so that a bias counts as much as a matrix. A sum of exactly zero
elects "+", as in the other rules; the official code elects "−". One model comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from regraft.merge.consensus import changed, winners
from regraft.merge.rule import Chunk, OneModel, Steps, Unit, rule
from regraft.merge.statistics import Sum
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    from torch import Tensor


class EmrOptions(Options):
    task: OneModel = Field(None, ge=0, description="the model whose task the result is for; without it, for all")
    lambda_: float = Field(
        1.0, alias="lambda", description="factor of the merged task vector, before the base is added"
    )
    rescaler: Literal["sum", "tensor_means"] = Field(
        "sum", description="what is compared for a task's rescaler: sums over the model, or over tensors of their means"
    )


@rule(
    summary="elect one task vector, from which a mask and a number per task give each model back",
    options=EmrOptions,
    needs_base=True,
    scope=lambda o: "tensor" if o.task is None else "model",
    model_wide=("task", "rescaler"),
    in_mergekit=False,
    papers=[
        Paper("EMR-Merging: Tuning-Free High-Performance Model Merging", "Huang et al.", "NeurIPS 2024", "2405.17461")
    ],
)
def emr(unit: Unit[EmrOptions]) -> Steps:
    task, rescaler = unit.options.task, 1.0
    if task is not None:

        def sizes(c: Chunk[EmrOptions]) -> Tensor:
            both = torch.stack([c.deltas[task], _masked(c, task)]).abs()
            return both / c.info.numel if c.options.rescaler == "tensor_means" else both

        (found,) = yield [Sum(sizes)]
        own, left = found.tolist()
        rescaler = own / left if left else 1.0
        unit.note(rescaler=rescaler)

    def combine(c: Chunk[EmrOptions]) -> Tensor:
        return changed(c.base, _masked(c, task), c.options.lambda_ * rescaler)

    return combine


def _masked(c: Chunk[EmrOptions], task: int | None) -> Tensor:
    """The elected task vector, (L,), with 0 where the task's own has another sign."""
    sizes, sign = winners(c.deltas)
    unified = sizes.amax(0) * sign
    return unified if task is None else torch.where(sizes[task] > 0, unified, torch.zeros_like(unified))
