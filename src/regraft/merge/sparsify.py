"""Making task vectors sparse, and making up for what was dropped.

Each stage is a generator that asks for the statistics it needs (`yield from` it in a rule) and returns a `Sparse`,
which makes task vectors (n, L) with zeros where entries were dropped.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regraft.merge.kernels import between, numbers, stored
from regraft.merge.random import chances, drop, drop_by_rank, kept_below, keys
from regraft.merge.rule import Chunk, Unit
from regraft.merge.statistics import OrderStatistic, Statistic, Sum, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

Stage = Generator[Sequence[Statistic], Sequence[np.ndarray], "Sparse"]

# mergekit's guard of the divisor when norms are restored.
_EPSILON = 1e-7
# Bytes that one unit may keep of its decisions, a bit for each element of each model; a larger one sorts again.
_MOST_MARKS = 32 << 20
_NO_MARKS = np.empty((0, 0, 0), np.uint8)


@dataclass(frozen=True)
class Sparse:
    """How a chunk's task vectors become sparse: one number per model in each field.

    An entry is kept if its magnitude is in [low, high] and its draw says so with the probability `density`, and is
    multiplied by `factor`. With `epsilons` that probability rises with the rank of its magnitude in its row, as in
    `drop_by_rank`, and what is kept is divided by it if `divide`; chunks are whole rows then.
    """

    n: int
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()
    divide: bool = False
    seed: int = 0
    factors: tuple[float, ...] = ()
    # What was decided by rank in an earlier sweep, for chunks by tensor and start, as `native_sparse.norms` notes it.
    marks: Mapping[tuple[str, int], np.ndarray] = field(default_factory=dict, compare=False)

    def __call__(self, c: Chunk[Any]) -> Tensor:
        """Sparse task vectors, (n, L). Treat as read-only."""
        deltas = between(c.deltas, self.low, self.high) if self.low else c.deltas
        factors = self.factors or (1.0,) * self.n
        if not self.densities:
            return deltas * torch.tensor(factors).to(deltas).unsqueeze(1) if self.factors else deltas
        out = torch.empty_like(deltas)
        for i, (row, density, factor) in enumerate(zip(deltas, self.densities, factors, strict=True)):
            stream: dict[str, Any] = {"seed": self.seed, "model": i, "name": c.info.name, "start": c.start}
            if self.epsilons and density < 1:
                drop_by_rank(row, c.info.width, density, self.epsilons[i], out[i], divide=self.divide, **stream)
                out[i] *= factor
            else:
                drop(row, density, factor, out[i], **stream)
        return out

    def scaled(self, factors: Sequence[float]) -> Sparse:
        """The same with all that is kept multiplied, besides what it was."""
        return replace(
            self, factors=tuple(a * b for a, b in zip(self.factors or (1.0,) * self.n, factors, strict=True))
        )

    def compiled(self, c: Chunk[Any]) -> tuple[Any, ...] | None:
        """The arguments that the loops in `native_sparse` have in common; None if they do not serve this chunk."""
        raw = stored(c)
        if raw is None or not c.has_base or (not self.epsilons and c.start % 4):
            return None
        from regraft.merge.native import TILE

        like, width = c.arithmetic, c.info.width
        densities = self.densities or (1.0,) * self.n
        always = np.full(self.n, kept_below(1.0), np.uint64)
        return (
            raw,
            c.start,
            width if self.epsilons else TILE,
            (
                numbers(self.low or (0.0,) * self.n, like),
                numbers(self.high or (math.inf,) * self.n, like),
                np.array([keys(self.seed, i, c.info.name) for i in range(self.n)], np.uint64),
                always if self.epsilons else np.array([kept_below(density) for density in densities], np.uint64),
                numbers(self.factors or (1.0,) * self.n, like),
                np.array([self._chances(i, width) for i in range(self.n)]),
                self.divide,
            ),
            self.marks.get((c.info.name, c.start), _NO_MARKS),
        )

    def _chances(self, i: int, width: int) -> tuple[float, float]:
        whole = not self.epsilons or self.densities[i] == 1
        return (1.0, 0.0) if whole else chances(self.densities[i], self.epsilons[i], width)


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
    unit.note(thresholds=found.tolist(), kept=_shares(np.maximum(sizes.upto[:, 1] - sizes.below[:, 0], 0), count))
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
    return Sparse(unit.n, densities=tuple(densities), epsilons=tuple(epsilons), divide=divide, seed=seed)


def norms_restored(unit: Unit[Any], sparse: Sparse) -> Stage:
    """Scale what is left of each model so that the L1 norm over the unit is that from before."""
    statistic = _Norms(sparse, keep=unit.numel * unit.n // 8 <= _MOST_MARKS)
    (norms,) = yield [statistic]
    before, after = norms[: unit.n], norms[unit.n :]
    factors = np.where(after > _EPSILON, before / np.maximum(after, _EPSILON), 1.0).tolist()
    unit.note(rescaled_by=factors)
    return replace(sparse.scaled(factors), marks=statistic.marks)


class _Norms(Sum):
    """L1 norms of the task vectors and then of what is left of them; result: float64, shape (2 n,)."""

    def __init__(self, sparse: Sparse, *, keep: bool) -> None:
        super().__init__(lambda c: torch.cat([c.deltas, sparse(c)]), absolute=True)
        self._sparse = sparse
        self._keep = keep and bool(sparse.epsilons) and not sparse.divide
        self.marks: dict[tuple[str, int], np.ndarray] = {}

    def partial(self, chunk: Chunk[Any]) -> np.ndarray:
        arguments = self._sparse.compiled(chunk)
        if arguments is None:
            return super().partial(chunk)
        from regraft.merge.native_sparse import norms

        *rest, marks = arguments
        if self._keep:
            width = chunk.info.width
            marks = np.empty((chunk.n, -(-chunk.length // width), -(-width // 8)), np.uint8)
            self.marks[chunk.info.name, chunk.start] = marks
        out = np.empty((2 * self._sparse.n, -(-chunk.length // chunk.block)))
        norms(*rest, marks, chunk.block, out[: self._sparse.n], out[self._sparse.n :])
        return out


def _shares(counts: np.ndarray, numel: int) -> list[float]:
    return [round(int(n) / numel, 6) for n in counts]
