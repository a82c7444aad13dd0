"""Making task vectors sparse, and making up for what was dropped.

Each stage is a generator that asks for the statistics it needs (`yield from` it in a rule) and returns a `Sparse`,
which makes task vectors (n, L) with zeros where entries were dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regraft.merge.kernels import between, numbers, stored
from regraft.merge.random import drop, drop_by_rank, kept_below, keys
from regraft.merge.rule import Chunk, Unit
from regraft.merge.statistics import OrderStatistic, Statistic, Sum, task_vectors

Stage = Generator[Sequence[Statistic], Sequence[Tensor], "Sparse"]

# mergekit's guard of the divisor when norms are restored.
_EPSILON = 1e-7


@dataclass(frozen=True)
class Sparse:
    """How a chunk's task vectors become sparse: one number per model in each field.

    An entry is kept if its magnitude is in [low, high] and its draw says so with the probability `density`, and is
    multiplied by `factor`. `other` replaces the choice of entries by a function chunk -> (n, L).
    """

    n: int
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    seed: int = 0
    factors: tuple[float, ...] = ()
    other: Callable[[Chunk[Any]], Tensor] | None = None

    def __call__(self, c: Chunk[Any]) -> Tensor:
        """Sparse task vectors, (n, L). Treat as read-only."""
        if self.other is not None:
            return self._scaled(self.other(c))
        deltas = between(c.deltas, self.low, self.high) if self.low else c.deltas
        if not self.densities:
            return self._scaled(deltas)
        out = torch.empty_like(deltas)
        factors = self.factors or (1.0,) * self.n
        for i, (row, density, factor) in enumerate(zip(deltas, self.densities, factors, strict=True)):
            drop(row, density, factor, out[i], seed=self.seed, model=i, name=c.info.name, start=c.start)
        return out

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows * torch.tensor(self.factors).to(rows).unsqueeze(1) if self.factors else rows

    def scaled(self, factors: Sequence[float]) -> Sparse:
        """The same with all that is kept multiplied, besides what it was."""
        return replace(
            self, factors=tuple(a * b for a, b in zip(self.factors or (1.0,) * self.n, factors, strict=True))
        )

    def compiled(self, c: Chunk[Any]) -> tuple[Any, ...] | None:
        """The arguments that the loops in `native_sparse` have in common; None if they do not serve this chunk."""
        raw = stored(c)
        if raw is None or not c.has_base or self.other is not None or c.start % 4:
            return None
        like = c.dtype
        low, high = self.low or (0.0,) * self.n, self.high or (math.inf,) * self.n
        streams = np.array([keys(self.seed, i, c.info.name) for i in range(self.n)], np.uint64)
        kept = np.array([kept_below(density) for density in self.densities or (1.0,) * self.n], np.uint64)
        factors = self.factors or (1.0,) * self.n
        return raw, c.start, numbers(low, like), numbers(high, like), streams, kept, numbers(factors, like)


def largest(unit: Unit[Any], densities: Sequence[float]) -> Stage:
    """Keep, per model, the share `density` of entries with the largest magnitude over the whole unit.

    The threshold is the ⌊density · d⌋-th largest magnitude, at least the largest; all entries that reach it are kept.
    """
    count = unit.numel
    keep = [max(1, math.floor(d * count)) for d in densities]
    if all(k == count for k in keep):
        return Sparse(unit.n)
    sizes = OrderStatistic(task_vectors, ranks=[[count - k] for k in keep], absolute=True)
    (found,) = yield [sizes]
    # Magnitudes of bf16 models lie on a grid, so that many may be equal to the threshold.
    unit.note(thresholds=found[:, 0].tolist(), kept=_shares(count - sizes.below[:, 0], count))
    return Sparse(unit.n, tuple(found[:, 0].tolist()), (math.inf,) * unit.n)


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
        return Sparse(unit.n)
    sizes = OrderStatistic(task_vectors, ranks=ranks, absolute=True)
    (found,) = yield [sizes]
    unit.note(thresholds=found.tolist(), kept=_shares((sizes.upto[:, 1] - sizes.below[:, 0]).clamp(min=0), count))
    low, high = found.T.tolist()
    return Sparse(unit.n, tuple(low), tuple(high))


def drawn(unit: Unit[Any], densities: Sequence[float], factors: Sequence[float], seed: int) -> Sparse:
    """Keep each entry with probability `density`, by a draw of its own, and multiply what is kept by `factor`."""
    return Sparse(unit.n, densities=tuple(densities), factors=tuple(factors), seed=seed)


def ranked(
    unit: Unit[Any], densities: Sequence[float], epsilons: Sequence[float], seed: int, *, divide: bool
) -> Sparse:
    """Keep each entry with a probability that rises with the rank of its magnitude in its row; see `drop_by_rank`.

    The rule must have the span "rows".
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

    return Sparse(unit.n, other=sparse)


def norms_restored(unit: Unit[Any], sparse: Sparse) -> Stage:
    """Scale what is left of each model so that the L1 norm over the unit is that from before."""
    (norms,) = yield [_Norms(sparse)]
    before, after = norms[: unit.n], norms[unit.n :]
    factors = torch.where(after > _EPSILON, before / after.clamp(min=_EPSILON), torch.ones_like(after)).tolist()
    unit.note(rescaled_by=factors)
    return sparse.scaled(factors)


class _Norms(Sum):
    """L1 norms of the task vectors and then of what is left of them; result: float64, shape (2 n,)."""

    def __init__(self, sparse: Sparse) -> None:
        super().__init__(lambda c: torch.cat([c.deltas, sparse(c)]), absolute=True)
        self._sparse = sparse

    def partial(self, chunk: Chunk[Any]) -> Tensor:
        arguments = self._sparse.compiled(chunk)
        if arguments is None:
            return super().partial(chunk)
        from regraft.merge.native_sparse import norms

        out = np.empty((2 * self._sparse.n, -(-chunk.length // chunk.block)))
        norms(*arguments, chunk.block, out[: self._sparse.n], out[self._sparse.n :])
        return torch.from_numpy(out)


def _shares(counts: Tensor, numel: int) -> list[float]:
    return [round(int(n) / numel, 6) for n in counts]
