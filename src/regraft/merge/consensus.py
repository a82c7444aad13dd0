"""From task vectors to one: the sum, or the mean of those that agree with the elected sign.

Shared by the rules that first make task vectors sparse. `deltas` are task vectors (n, L), `weights` one number per
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from regraft.merge.kernels import added, changed, count_zeros, elect, numbers, weighted_sum, winners
from regraft.merge.rule import Chunk, PerModel
from regraft.merge.sparsify import Sparse
from regraft.methods import Options

__all__ = [
    "ABOUT_ZERO",
    "Density",
    "Sparse",
    "TaskVectorOptions",
    "added",
    "changed",
    "elected",
    "onto_base",
    "total",
    "winners",
]

ABOUT_ZERO = 1e-8
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
    return merged / sum(weights) if normalize and abs(sum(weights)) >= ABOUT_ZERO else merged


def elected(deltas: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum of the entries whose weighted sign won, (L,); their weighted mean if `normalize`."""
    return elect(deltas, weights, normalize)


def onto_base(
    sparse: Sparse,
    join: Callable[[Tensor, Sequence[float], bool], Tensor],
    on_zeros: Callable[[Tensor, int], None] | None = None,
) -> Callable[[Chunk[Any]], Tensor]:
    """The last pass of these rules: `base + lambda * join(sparse task vectors, weights, normalize)`.

    Args:
        sparse: how task vectors become sparse.
        join: `total` or `elected`.
        on_zeros: told, for each chunk, the entries of each full task vector that are zero (n,), and its length.
    """

    def combine(c: Chunk[Any]) -> Tensor:
        o = c.options
        arguments = sparse.compiled(c)
        if arguments is None:
            if on_zeros is not None:
                on_zeros(count_zeros(c.deltas), c.length)
            return changed(c.base, join(sparse(c), o.weight, o.normalize), o.lambda_)
        from regraft.merge import native_sparse

        zeros, out = np.zeros(c.n, np.int64), np.empty(c.length, np.float32)
        scale = o.lambda_
        if join is total and o.normalize and abs(sum(o.weight)) >= ABOUT_ZERO:
            scale /= sum(o.weight)
        weights = numbers(o.weight, c.dtype)
        native_sparse.merge(*arguments, weights, join is elected, o.normalize, np.float32(scale), zeros, out)
        if on_zeros is not None:
            on_zeros(torch.from_numpy(zeros), c.length)
        return torch.from_numpy(out)

    return combine
