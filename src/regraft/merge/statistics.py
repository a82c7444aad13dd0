"""Statistics of a stream: numbers that depend on whole tensors, computed chunk by chunk, exactly reproducible.

Sums are taken over fixed blocks of elements in float64 and added with one exact rounding at the end, order statistics
are selected exactly through histograms of the floats' bit patterns: neither depends on the chunk size, on the order of
chunks or on the number of workers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.rule import Chunk

# Below this many elements the values themselves are kept and sorted; above, histograms are filled.
_KEEP = 1 << 16
_BINS = 1 << 16


class Statistic(Protocol):
    """Filled by one or more sweeps over all chunks of a unit. `observe` is pure and runs in many threads."""

    @property
    def sweeps(self) -> int:
        """How many sweeps it takes, as far as known before the first (for progress and estimates)."""
        ...

    def begin(self, numel: int) -> None: ...
    def observe(self, chunk: Chunk[Any]) -> Any: ...
    def absorb(self, partial: Any) -> None: ...
    def finish(self) -> bool:
        """End a sweep; True if the result is complete, False if another sweep is needed."""
        ...

    @property
    def result(self) -> Tensor: ...


class Sum:
    """Sum over all elements of each row of `f(chunk)`; result: float64, shape (rows,).

    `f` returns (rows, L) or (L,) (one row). Non-finite values give a non-finite sum.
    """

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Tensor]) -> None:
        self._f = f
        self._lock = threading.Lock()
        self._partials: list[Tensor] = []
        self.result = torch.empty(0, dtype=torch.float64)

    def begin(self, numel: int) -> None:
        self._partials.clear()

    def observe(self, chunk: Chunk[Any]) -> Tensor:
        values = torch.atleast_2d(self._f(chunk))
        rows, length = values.shape
        whole = length // BLOCK * BLOCK
        sums = []
        if whole:
            blocks = values[:, :whole].contiguous().view(rows, -1, BLOCK)
            sums.append(blocks.sum(-1, dtype=torch.float64))
        if whole < length:
            sums.append(values[:, whole:].contiguous().sum(-1, keepdim=True, dtype=torch.float64))
        return torch.cat(sums, 1) if sums else torch.zeros(rows, 1, dtype=torch.float64)

    def absorb(self, partial: Tensor) -> None:
        with self._lock:
            self._partials.append(partial)

    def finish(self) -> bool:
        rows = torch.cat(self._partials, 1).tolist()
        self.result = torch.tensor([_exact_sum(row) for row in rows], dtype=torch.float64)
        self._partials.clear()
        return True


class Gram:
    """Inner products between the rows of `f(chunk)` over all elements; result: float64, shape (rows, rows)."""

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Tensor]) -> None:
        self._f = f
        self._lock = threading.Lock()
        self._partials: list[Tensor] = []
        self.result = torch.empty(0, dtype=torch.float64)

    def begin(self, numel: int) -> None:
        self._partials.clear()

    def observe(self, chunk: Chunk[Any]) -> Tensor:
        values = self._f(chunk)
        # Each block is copied to its own aligned buffer: BLAS may round differently for another layout.
        blocks = [values[:, i : i + BLOCK].to(torch.float64, copy=True) for i in range(0, values.shape[1], BLOCK)]
        return torch.stack([block.contiguous() @ block.T.contiguous() for block in blocks])

    def absorb(self, partial: Tensor) -> None:
        with self._lock:
            self._partials.append(partial)

    def finish(self) -> bool:
        stacked = torch.cat(self._partials)
        rows = stacked.shape[-1]
        columns = stacked.reshape(stacked.shape[0], -1).T.tolist()
        self.result = torch.tensor([_exact_sum(c) for c in columns], dtype=torch.float64).view(rows, rows)
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
        self._parts: list[tuple[int, Tensor]] = []
        self.result = torch.empty(0, dtype=torch.float64)

    def begin(self, numel: int) -> None:
        self._runs = numel // self._width
        self._parts.clear()

    def observe(self, chunk: Chunk[Any]) -> list[tuple[int, Tensor]]:
        values = self._f(chunk)
        parts = []
        for offset in range(0, values.shape[1], BLOCK):
            block = values[:, offset : offset + BLOCK].to(torch.float64)
            start = chunk.start + offset
            stop = start + block.shape[1]
            first, last = start // self._width, (stop - 1) // self._width
            edges = [min((run + 1) * self._width, stop) for run in range(first, last + 1)]
            lengths = torch.tensor([edge - low for low, edge in zip([start, *edges], edges, strict=False)])
            sums = torch.segment_reduce(block.T.contiguous(), "sum", lengths=lengths, axis=0)
            parts.append((start, sums.T))
        return parts

    def absorb(self, partial: list[tuple[int, Tensor]]) -> None:
        with self._lock:
            self._parts += partial

    def finish(self) -> bool:
        rows = self._parts[0][1].shape[0] if self._parts else 0
        self.result = torch.zeros((rows, self._runs), dtype=torch.float64)
        for start, sums in sorted(self._parts, key=lambda part: part[0]):
            first = start // self._width
            self.result[:, first : first + sums.shape[1]] += sums
        self._parts.clear()
        return True


class MinMax:
    """Smallest and largest value of each row of `f(chunk)`; result: shape (rows, 2), in the arithmetic dtype."""

    sweeps = 1

    def __init__(self, f: Callable[[Chunk[Any]], Tensor]) -> None:
        self._f = f
        self._lock = threading.Lock()
        self.result = torch.empty(0)

    def begin(self, numel: int) -> None:
        self.result = torch.empty(0)

    def observe(self, chunk: Chunk[Any]) -> Tensor:
        values = torch.atleast_2d(self._f(chunk))
        return torch.stack([values.amin(1), values.amax(1)], 1)

    def absorb(self, partial: Tensor) -> None:
        with self._lock:
            if self.result.numel() == 0:
                self.result = partial
            else:
                low = torch.minimum(self.result[:, 0], partial[:, 0])
                self.result = torch.stack([low, torch.maximum(self.result[:, 1], partial[:, 1])], 1)

    def finish(self) -> bool:
        return True


class OrderStatistic:
    """Exact order statistics of each row of `f(chunk)` over all elements of the unit.

    Args:
        f: chunk -> values (rows, L) or (L,).
        ranks: 0-based ranks in ascending order of value: one list for all rows, or one list per row.

    The result has shape (rows, number of ranks) in the arithmetic dtype. Two sweeps for float32, four for float64:
    each resolves 16 bits of an order-preserving integer image of the floats. `below` and `upto`, of the same shape,
    then count the entries less than, and not greater than, each of them.
    """

    def __init__(
        self,
        f: Callable[[Chunk[Any]], Tensor],
        *,
        ranks: Sequence[int] | Sequence[Sequence[int]],
    ) -> None:
        self._f = f
        self._ranks = ranks
        self._lock = threading.Lock()
        self.sweeps = 2
        self.result = torch.empty(0)
        self.below = self.upto = torch.empty(0, dtype=torch.int64)

    def begin(self, numel: int) -> None:
        self.sweeps = 1 if numel <= _KEEP else 2
        self._kept: list[Tensor] | None = [] if numel <= _KEEP else None
        self._targets: list[list[int]] = []  # per row, remaining rank inside the prefix found so far
        self._prefixes: list[list[int]] = []
        self._histograms: dict[tuple[int, int], Tensor] = {}
        self._level = 0
        self._dtype = torch.float32

    def _targets_for(self, rows: int) -> list[list[int]]:
        if self._ranks and isinstance(self._ranks[0], Sequence):
            return [list(r) for r in self._ranks]  # type: ignore[arg-type]
        return [list(self._ranks) for _ in range(rows)]  # type: ignore[arg-type]

    def observe(self, chunk: Chunk[Any]) -> Any:
        values = torch.atleast_2d(self._f(chunk))
        if self._kept is not None:
            return values.clone()
        keys = _ordered_keys(values)
        total = keys.dtype.itemsize * 8
        shift = total - 16 * (self._level + 1)
        partial: dict[tuple[int, int], Tensor] = {}
        for row in range(keys.shape[0]):
            prefixes = set(self._prefixes[row]) if self._level else {0}
            for prefix in prefixes:
                selected = keys[row]
                if self._level:
                    selected = selected[(selected >> (shift + 16)) == prefix]
                digit = (selected >> shift) & (_BINS - 1)
                if self._level == 0:
                    digit = digit ^ (_BINS >> 1)  # the sign bit: negatives come first
                partial[row, prefix] = torch.bincount(digit, minlength=_BINS)
        return values.dtype, keys.shape[0], partial

    def absorb(self, partial: Any) -> None:
        with self._lock:
            if self._kept is not None:
                self._kept.append(partial)
                return
            self._dtype, self._rows, histograms = partial
            for key, counts in histograms.items():
                if key in self._histograms:
                    self._histograms[key] += counts
                else:
                    self._histograms[key] = counts.clone()

    def finish(self) -> bool:
        if self._kept is not None:
            ordered = torch.cat(self._kept, 1).sort(1).values
            targets = self._targets_for(ordered.shape[0])
            self.result = torch.stack([row[torch.tensor(t)] for row, t in zip(ordered, targets, strict=True)])
            self.below = torch.searchsorted(ordered, self.result)
            self.upto = torch.searchsorted(ordered, self.result, right=True)
            self._kept = None
            return True
        bits = self._dtype.itemsize * 8
        if self._level == 0:
            self._targets = self._targets_for(self._rows)
            self._prefixes = [[0] * len(t) for t in self._targets]
            self.below = torch.zeros((self._rows, len(self._targets[0])), dtype=torch.int64)
        same = torch.zeros_like(self.below)  # entries that share the digits found so far
        for row, ranks in enumerate(self._targets):
            for i, wanted in enumerate(ranks):
                cumulative = self._histograms[row, self._prefixes[row][i]].cumsum(0)
                digit = int(torch.searchsorted(cumulative, wanted, right=True))
                below = int(cumulative[digit - 1]) if digit else 0
                self._targets[row][i] = wanted - below
                self.below[row, i] += below
                same[row, i] = int(cumulative[digit]) - below
                if self._level == 0:
                    digit -= _BINS >> 1  # back to the signed top digit
                    self._prefixes[row][i] = digit
                else:
                    self._prefixes[row][i] = (self._prefixes[row][i] << 16) | digit
        self._histograms = {}
        self._level += 1
        if self._level * 16 < bits:
            return False
        self.upto = self.below + same
        integer = torch.int32 if bits == 32 else torch.int64
        self.result = _from_keys(torch.tensor(self._prefixes, dtype=integer), self._dtype)
        return True


def _ordered_keys(values: Tensor) -> Tensor:
    """Signed integers in the same order as the floats (-0.0 counts as below +0.0)."""
    integer = torch.int32 if values.dtype == torch.float32 else torch.int64
    raw = values.contiguous().view(integer)
    return raw ^ ((raw >> (integer.itemsize * 8 - 1)) & torch.iinfo(integer).max)


def _from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    raw = keys ^ ((keys >> (keys.dtype.itemsize * 8 - 1)) & torch.iinfo(keys.dtype).max)
    return raw.view(dtype)
