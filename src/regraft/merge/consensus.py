"""From several models, or task vectors, to one: weighted sums, and means of what agrees with the elected sign.

`deltas` are task vectors (n, L), `weights` one number per model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from regraft.merge.kernels import (
    Values,
    added,
    changed,
    count_zeros,
    elect,
    mixture,
    models_sum,
    numbers,
    weighted_sum,
    winners,
    with_changes,
)
from regraft.merge.rule import Chunk, Combine, PerModel
from regraft.merge.sparsify import Sparse
from regraft.methods import Options

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ABOUT_ZERO",
    "Density",
    "Sparse",
    "TaskVectorOptions",
    "added",
    "blended",
    "changed",
    "elected",
    "of_runs",
    "onto_base",
    "total",
    "winners",
]

ABOUT_ZERO = 1e-8
_ROUNDING = 1e-12  # how far weights may add up to something else than one by the rounding of their computation
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


def blended(weights: Sequence[float], has_base: bool) -> Combine:
    """The last pass of rules that come down to one number per model: Σ wᵢ θᵢ, or θ₀ + Σ wᵢ δᵢ if they have a base.

    Entries that are equal in all models keep their bits if the weights add up to one.
    """
    if has_base:
        return lambda c: with_changes(c, weights)
    if abs(sum(weights) - 1) < _ROUNDING:
        anchor = next(i for i, w in enumerate(weights) if w)
        return lambda c: mixture(c, weights, anchor)
    return lambda c: models_sum(c, weights)


def of_runs(values: np.ndarray, c: Chunk[Any], width: int) -> Tensor:
    """For each entry of a chunk, (L,), the value of the run of `width` entries that it is in; one for all stays one."""
    if len(values) == 1:
        return c.like(values)
    places = torch.arange(c.start, c.start + c.length, device=c.device)
    return c.like(values)[places.div(width, rounding_mode="floor")]


def onto_base(
    sparse: Sparse,
    join: Callable[[Tensor, Sequence[float], bool], Tensor],
    on_zeros: Callable[[np.ndarray, int], None] | None = None,
) -> Combine:
    """The last pass of these rules: `base + lambda * join(sparse task vectors, weights, normalize)`.

    Args:
        sparse: how task vectors become sparse.
        join: `total` or `elected`.
        on_zeros: told, for each chunk, the entries of each full task vector that are zero (n,), and its length.
    """

    def combine(c: Chunk[Any]) -> Values:
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
        weights = numbers(o.weight, c.arithmetic)
        native_sparse.merge(*arguments, weights, join is elected, o.normalize, np.float32(scale), zeros, out)
        if on_zeros is not None:
            on_zeros(zeros, c.length)
        return out

    return combine
