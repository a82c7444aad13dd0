"""From task vectors to one: the sum, or the mean of those that agree with the elected sign.

Shared by the rules that first make task vectors sparse. `deltas` are task vectors (n, L), `weights` a column (n, 1)
or one weight per entry (n, L).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from regraft.merge.rule import Chunk, PerModel
from regraft.methods import Options

Density = Annotated[float, Field(gt=0, le=1)]


class TaskVectorOptions(Options):
    """What all rules over task vectors share."""

    weight: PerModel[float] = Field((1.0,), description="factor of each model's task vector")
    lambda_: float = Field(
        1.0, alias="lambda", description="factor of the merged task vector, before the base is added"
    )


def added(rows: Iterable[Tensor]) -> Tensor:
    """Sum over models, (n, L) -> (L,), in their order, at least one.

    `rows.sum(0)` may add in another order in a slice of another length, and results must not depend on how tensors are
    cut.
    """
    each = iter(rows)
    out = next(each).clone()
    for row in each:
        out += row
    return out


def changed(base: Tensor, change: Tensor) -> Tensor:
    """`base + change`; an entry that does not change keeps its bits (-0.0 + 0.0 would be 0.0)."""
    return torch.where(change == 0, base, base + change)


def winners(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes (n, L) of the entries that have the sign of their column's sum, 0 for the others, and that sign (L,).

    A sum of exactly zero counts as positive (TIES, arXiv:2306.01708, elects by total magnitude).
    """
    balance = added(deltas).add_(0.0)  # -0.0 becomes 0.0
    sign = torch.copysign(torch.ones_like(balance), balance)
    return (deltas * sign).clamp_(min=0), sign


def total(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Weighted sum over models, (L,); divided by the sum of weights if `normalize` (and that is not about zero)."""
    merged = added(deltas * weights)
    if normalize:
        divisor = added(weights)
        merged = merged / torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
    return merged


def elected(deltas: Tensor, weights: Tensor, normalize: bool) -> Tensor:
    """Weighted sum of the entries whose weighted sign won, (L,); their weighted mean if `normalize`."""
    sizes, sign = winners(deltas * weights)
    merged = added(sizes) * sign
    if normalize:
        divisor = added(torch.sign(sizes) * weights)
        merged = merged / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return merged


def onto_base(
    sparse: Callable[[Chunk[Any]], Tensor], join: Callable[[Tensor, Tensor, bool], Tensor]
) -> Callable[[Chunk[Any]], Tensor]:
    """The last pass of these rules: `base + lambda * join(sparse task vectors, weights, normalize)`."""

    def combine(c: Chunk[Any]) -> Tensor:
        merged = join(sparse(c), c.per_model(c.options.weight), c.options.normalize)
        return changed(c.base, c.options.lambda_ * merged)

    return combine
