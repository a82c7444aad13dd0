"""From task vectors to one: the sum, or the mean of those that agree with the elected sign.

Shared by the rules that first make task vectors sparse. `deltas` are task vectors (n, L), `weights` one number per
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from regraft.merge.kernels import added, changed, elect, weighted_sum, winners
from regraft.merge.rule import Chunk, PerModel
from regraft.methods import Options

__all__ = ["Density", "TaskVectorOptions", "added", "changed", "elected", "onto_base", "total", "winners"]

Density = Annotated[float, Field(gt=0, le=1)]


class TaskVectorOptions(Options):
    """What all rules over task vectors share."""

    weight: PerModel[float] = Field((1.0,), description="factor of each model's task vector")
    lambda_: float = Field(
        1.0, alias="lambda", description="factor of the merged task vector, before the base is added"
    )


def total(deltas: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum over models, (L,); divided by the sum of weights if `normalize` (and that is not about zero)."""
    merged = weighted_sum(deltas, weights)
    if normalize and abs(sum(weights)) >= 1e-8:
        merged = merged / sum(weights)
    return merged


def elected(deltas: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum of the entries whose weighted sign won, (L,); their weighted mean if `normalize`."""
    return elect(deltas, weights, normalize)


def onto_base(
    sparse: Callable[[Chunk[Any]], Tensor], join: Callable[[Tensor, Sequence[float], bool], Tensor]
) -> Callable[[Chunk[Any]], Tensor]:
    """The last pass of these rules: `base + lambda * join(sparse task vectors, weights, normalize)`."""

    def combine(c: Chunk[Any]) -> Tensor:
        return changed(c.base, join(sparse(c), c.options.weight, c.options.normalize), c.options.lambda_)

    return combine
