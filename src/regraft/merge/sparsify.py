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
from torch.nn.functional import hardshrink

from regraft.merge.random import keep_mask
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
    sizes = OrderStatistic(lambda c: c.deltas.abs(), ranks=[[count - k] for k in keep])
    (found,) = yield [sizes]
    # Magnitudes of bf16 models lie on a grid, so that many may be equal to the threshold.
    unit.note(thresholds=found[:, 0].tolist(), kept=_shares(count - sizes.below[:, 0], count))
    least = found[:, 0].tolist()

    def sparse(c: Chunk[Any]) -> Tensor:
        return reaching(c.deltas, least)

    return sparse


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
    sizes = OrderStatistic(lambda c: c.deltas.abs(), ranks=ranks)
    (found,) = yield [sizes]
    unit.note(thresholds=found.tolist(), kept=_shares((sizes.upto[:, 1] - sizes.below[:, 0]).clamp(min=0), count))
    low, high = found.T.tolist()

    def sparse(c: Chunk[Any]) -> Tensor:
        out = reaching(c.deltas, low)
        for row, limit in zip(out, high, strict=True):
            row -= hardshrink(row, limit)
        return out

    return sparse


def reaching(deltas: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Entries (n, L) whose magnitude is at least the threshold of their row, 0 elsewhere; values of `deltas.dtype`."""
    out = torch.empty_like(deltas)
    for row, target, threshold in zip(deltas, out, thresholds, strict=True):
        # hardshrink, several times faster than a mask, drops up to its limit: the next smaller number of this dtype.
        limit = torch.nextafter(torch.tensor(threshold, dtype=deltas.dtype), torch.tensor(-1.0, dtype=deltas.dtype))
        target.copy_(hardshrink(row, float(limit)))
    return out


def drawn(unit: Unit[Any], densities: Sequence[float], seed: int) -> Sparse:
    """Keep each entry with probability `density`, by a draw of its own."""

    def sparse(c: Chunk[Any]) -> Tensor:
        out = torch.zeros_like(c.deltas)
        for i, density in enumerate(densities):
            if density == 1:
                out[i] = c.deltas[i]
                continue
            keep = keep_mask(c.random_bits(seed, i), density)
            torch.where(keep, c.deltas[i], out[i], out=out[i])
        return out

    return sparse


def norms_restored(unit: Unit[Any], sparse: Sparse) -> Stage:
    """Scale what is left of each model so that the L1 norm over the unit is that from before."""
    before, after = yield [Sum(lambda c: c.deltas.abs()), Sum(lambda c: sparse(c).abs())]
    factors = torch.where(after > _EPSILON, before / after.clamp(min=_EPSILON), torch.ones_like(after))
    unit.note(rescaled_by=factors.tolist())
    return lambda c: sparse(c) * factors.to(c.models.dtype).unsqueeze(1)


def _shares(counts: Tensor, numel: int) -> list[float]:
    return [round(int(n) / numel, 6) for n in counts]
