"""Making task vectors sparse, and making up for what was dropped.

Each piece is a generator that asks for the statistics it needs (`yield from` it in a rule) and returns a function
chunk -> task vectors (n, L) with zeros where entries were dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from regraft.merge.kernels import between
from regraft.merge.random import drop, drop_by_rank
from regraft.merge.rule import Chunk, Unit
from regraft.merge.statistics import OrderStatistic, Statistic, Sum

Sparse = Callable[[Chunk[Any]], Tensor]
Stage = Generator[Sequence[Statistic], Sequence[Tensor], Sparse]

# mergekit's guard of the divisor when norms are restored.
_EPSILON = 1e-7


def largest(unit: Unit[Any], densities: Sequence[float]) -> Stage:
    """Keep, per model, the share `density` of entries with the largest magnitude over the whole unit.

    The threshold is the ⌊density · d⌋-th largest magnitude, at least the largest; all entries that reach it are kept.
    """
    count = unit.numel
    keep = [max(1, math.floor(d * count)) for d in densities]
    if all(k == count for k in keep):
        return lambda c: c.deltas
    sizes = OrderStatistic(lambda c: c.deltas, ranks=[[count - k] for k in keep], absolute=True)
    (found,) = yield [sizes]
    # Magnitudes of bf16 models lie on a grid, so that many may be equal to the threshold.
    unit.note(thresholds=found[:, 0].tolist(), kept=_shares(count - sizes.below[:, 0], count))
    least, most = found[:, 0].tolist(), [math.inf] * unit.n
    return lambda c: between(c.deltas, least, most)


def middle(unit: Unit[Any], densities: Sequence[float], gammas: Sequence[float]) -> Stage:
    """Drop, per model, the share `gamma` of the largest entries and so many of the smallest that `density` is left.

    If `density` leaves no room for that, fewer of the largest are dropped.
    """
    count = unit.numel
    ranks = []
    for density, gamma in zip(densities, gammas, strict=True):
        top = math.floor(gamma * count)
        bottom = count - math.floor(density * count) - top
        if bottom < 0:
            top, bottom = top + bottom, 0
        ranks.append([min(bottom, count - 1), max(count - top - 1, 0)])
    if all(pair == [0, count - 1] for pair in ranks):
        return lambda c: c.deltas
    sizes = OrderStatistic(lambda c: c.deltas, ranks=ranks, absolute=True)
    (found,) = yield [sizes]
    unit.note(thresholds=found.tolist(), kept=_shares((sizes.upto[:, 1] - sizes.below[:, 0]).clamp(min=0), count))
    low, high = found.T.tolist()
    return lambda c: between(c.deltas, low, high)


def drawn(unit: Unit[Any], densities: Sequence[float], factors: Sequence[float], seed: int) -> Sparse:
    """Keep each entry with probability `density`, by a draw of its own, and multiply what is kept by `factor`."""

    def sparse(c: Chunk[Any]) -> Tensor:
        out = torch.empty_like(c.deltas)
        for i, (row, density, factor) in enumerate(zip(c.deltas, densities, factors, strict=True)):
            drop(row, density, factor, out[i], seed=seed, model=i, name=c.info.name, start=c.start)
        return out

    return sparse


def ranked(
    unit: Unit[Any], densities: Sequence[float], epsilons: Sequence[float], seed: int, *, divide: bool
) -> Sparse:
    """Keep each entry with a probability that rises with the rank of its magnitude in its row; see `drop_by_rank`.

    The rule must ask for `whole_rows`.
    """

    def sparse(c: Chunk[Any]) -> Tensor:
        out = torch.empty_like(c.deltas)
        for i, (row, density, epsilon) in enumerate(zip(c.deltas, densities, epsilons, strict=True)):
            if density == 1:
                out[i] = row
                continue
            drop_by_rank(
                row,
                c.info.width,
                density,
                epsilon,
                out[i],
                divide=divide,
                seed=seed,
                model=i,
                name=c.info.name,
                start=c.start,
            )
        return out

    return sparse


def norms_restored(unit: Unit[Any], sparse: Sparse) -> Stage:
    """Scale what is left of each model so that the L1 norm over the unit is that from before."""
    before, after = yield [Sum(lambda c: c.deltas, absolute=True), Sum(sparse, absolute=True)]
    factors = torch.where(after > _EPSILON, before / after.clamp(min=_EPSILON), torch.ones_like(after))
    unit.note(rescaled_by=factors.tolist())

    def restored(c: Chunk[Any]) -> Tensor:
        left = sparse(c)
        column = factors.to(left).unsqueeze(1)
        return left * column if left is c.deltas else left.mul_(column)

    return restored


def _shares(counts: Tensor, numel: int) -> list[float]:
    return [round(int(n) / numel, 6) for n in counts]
