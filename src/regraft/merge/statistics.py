"""Statistics of a stream: numbers that depend on whole tensors, computed chunk by chunk, exactly reproducible.

Sums are taken over fixed blocks of elements (see `Chunk.block`) in float64 and added with one exact rounding at the
end, order statistics are selected exactly (see `selection`): neither depends on the chunk size, on the order of chunks
or on the number of workers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.kernels import Values, array, block_grams, block_sums, in_rows, stored, stored_grams
from regraft.merge.rule import Chunk
from regraft.merge.selection import OrderStatistic, models, task_vectors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ColumnSums", "Gram", "MinMax", "OrderStatistic", "RowSums", "Statistic", "Sum", "models", "task_vectors"]


class Statistic(Protocol):
    """Filled by one or more sweeps over all chunks of a unit. `observe` is called from many threads at once."""

    @property
    def sweeps(self) -> int:
        """How many sweeps it takes, as far as known before the first (for progress and estimates)."""
        ...

    def begin(self, numel: int) -> None: ...
    def observe(self, chunk: Chunk[Any]) -> None: ...
    def finish(self) -> bool:
        """End a sweep; True if the result is complete, False if another sweep is needed."""
        ...

    @property
    def result(self) -> np.ndarray: ...


class Sum:
    """Sum over all elements of each row of `f(chunk)`; result: float64, shape (rows,).

    `f` returns (rows, L) or (L,) (one row), a tensor or an array. Non-finite values give a non-finite sum.

    Args:
        f: chunk -> values.
        absolute: sum magnitudes (the L1 norm).
    """

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Values], *, absolute: bool = False) -> None:
        self._f, self._absolute = f, absolute
        self._lock = threading.Lock()
        self._partials: list[np.ndarray] = []
        self.result = np.empty(0)

    def begin(self, numel: int) -> None:
        self._partials.clear()

    def partial(self, chunk: Chunk[Any]) -> np.ndarray:
        """Sums over the chunk's blocks, (rows, blocks)."""
        return block_sums(in_rows(chunk.computed(self._f)), absolute=self._absolute, block=chunk.block)

    def observe(self, chunk: Chunk[Any]) -> None:
        sums = self.partial(chunk)
        with self._lock:
            self._partials.append(sums)

    def finish(self) -> bool:
        rows = np.concatenate(self._partials, 1).tolist()
        self.result = np.array([_exact_sum(row) for row in rows])
        self._partials.clear()
        return True


class Gram:
    """Inner products between the rows of `f(chunk)` over all elements; result: float64, shape (rows, rows)."""

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Values]) -> None:
        self._f = f
        self._lock = threading.Lock()
        self._partials: list[np.ndarray] = []
        self.result: np.ndarray = np.empty(0)

    def begin(self, numel: int) -> None:
        self._partials.clear()

    def observe(self, chunk: Chunk[Any]) -> None:
        whole = self._f in (models, task_vectors) and chunk.has_base == (self._f is task_vectors)
        raw = stored(chunk) if whole and chunk.block % BLOCK == 0 else None
        if raw is None:
            grams = block_grams(chunk.computed(self._f), block=chunk.block)
        else:
            grams = stored_grams(raw, chunk.n, block=chunk.block)
        with self._lock:
            self._partials.append(grams)

    def finish(self) -> bool:
        stacked = np.concatenate(self._partials)
        rows = stacked.shape[-1]
        columns = stacked.reshape(stacked.shape[0], -1).T.tolist()
        self.result = np.array([_exact_sum(c) for c in columns], dtype=np.float64).reshape(rows, rows)
        self._partials.clear()
        return True


def _exact_sum(values: list[float]) -> float:
    if all(math.isfinite(v) for v in values):
        return math.fsum(values)
    return math.nan


class RowSums:
    """Sum of each row of `f(chunk)` over runs of `width` elements of one tensor (its rows along the last axis).

    Result: float64, shape (rows of f, numel / width). Within a block each run is summed in order, and the parts of a
    run that lie in different blocks are added in their order, so that cutting does not matter.
    """

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Tensor], width: int) -> None:
        self._f, self._width = f, width
        self._lock = threading.Lock()
        self._parts: list[tuple[int, np.ndarray]] = []
        self.result = np.empty(0)

    def begin(self, numel: int) -> None:
        self._runs = numel // self._width
        self._parts.clear()

    def observe(self, chunk: Chunk[Any]) -> None:
        values = torch.as_tensor(chunk.computed(self._f))
        parts = []
        for offset in range(0, values.shape[1], BLOCK):
            block = values[:, offset : offset + BLOCK].to(torch.float64)
            start = chunk.start + offset
            stop = start + block.shape[1]
            first, last = start // self._width, (stop - 1) // self._width
            edges = [min((run + 1) * self._width, stop) for run in range(first, last + 1)]
            lengths = torch.tensor([edge - low for low, edge in zip([start, *edges], edges, strict=False)])
            sums = torch.segment_reduce(block.T.contiguous(), "sum", lengths=lengths.to(block.device), axis=0)
            parts.append((start, array(sums.T.cpu())))
        with self._lock:
            self._parts += parts

    def finish(self) -> bool:
        rows = self._parts[0][1].shape[0] if self._parts else 0
        self.result = np.zeros((rows, self._runs))
        for start, sums in sorted(self._parts, key=lambda part: part[0]):
            first = start // self._width
            self.result[:, first : first + sums.shape[1]] += sums
        self._parts.clear()
        return True


class ColumnSums:
    """Sum over all runs of `width` elements of `f(chunk)`, place by place (the sums along one tensor's first axis).

    Result: float64, shape (rows of f, width). Within a block runs are summed in one go, and blocks are added in their
    order, so that cutting does not matter: a chunk that comes before its turn waits.
    """

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Tensor], width: int) -> None:
        self._f, self._width = f, width
        self._lock = threading.Lock()
        self._early: dict[int, np.ndarray] = {}
        self._next = 0
        self.result = np.empty(0)

    def begin(self, numel: int) -> None:
        self._early.clear()
        self._next = 0
        self.result = np.empty(0)

    def observe(self, chunk: Chunk[Any]) -> None:
        values = array(chunk.computed(self._f).cpu())
        with self._lock:
            # A chunk's memory is used again as soon as this returns.
            self._early[chunk.start] = values if chunk.start == self._next else values.copy()
            if self.result.size == 0:
                self.result = np.zeros((values.shape[0], self._width))
            while self._next in self._early:
                part = self._early.pop(self._next)
                for at in range(0, part.shape[1], BLOCK):
                    self._add(part[:, at : at + BLOCK].astype(np.float64))

    def _add(self, block: np.ndarray) -> None:
        """Add what comes next: the end of a run, whole runs, the beginning of one."""
        length = block.shape[1]
        column = self._next % self._width
        end = min(-column % self._width, length)
        whole = (length - end) // self._width
        rest = end + whole * self._width
        self.result[:, column : column + end] += block[:, :end]
        if whole:
            self.result += block[:, end:rest].reshape(len(block), whole, self._width).sum(1)
        self.result[:, : length - rest] += block[:, rest:]
        self._next += length

    def finish(self) -> bool:
        return True


class MinMax:
    """Smallest and largest value of each row of `f(chunk)`; result: shape (rows, 2), in the arithmetic dtype."""

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Values]) -> None:
        self._f = f
        self._lock = threading.Lock()
        self.result = np.empty(0)

    def begin(self, numel: int) -> None:
        self.result = np.empty(0)

    def observe(self, chunk: Chunk[Any]) -> None:
        values = in_rows(chunk.computed(self._f))
        if not isinstance(values, np.ndarray):
            found = array(torch.stack([values.amin(1), values.amax(1)], 1).cpu())
        else:
            found = np.stack([values.min(1), values.max(1)], 1)
        with self._lock:
            if self.result.size:
                low = np.minimum(self.result[:, 0], found[:, 0])
                found = np.stack([low, np.maximum(self.result[:, 1], found[:, 1])], 1)
            self.result = found

    def finish(self) -> bool:
        return True
