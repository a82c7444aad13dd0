"""Exact order statistics of a stream, in one or two sweeps over float32, without sorting or keeping the values.

Floats are ordered like integers made from their bits (keys). Histograms of the keys' upper halves tell in which of
65536 ranges the wanted value lies, a histogram of the lower halves within that range tells which it is. A small sample
that is looked at beforehand foretells the range, so that both histograms are usually filled in the same sweep; if it
was wrong, a second sweep fills the one that is missing. The result never depends on the sample.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from regraft.merge.kernels import Values, array, bits, fused, in_rows, stored
from regraft.merge.rule import Chunk
from regraft.merge.storage import stored_deltas

if TYPE_CHECKING:
    from torch import Tensor

# Up to this many elements the values themselves are kept and sorted; above, histograms are filled.
_KEEP = 1 << 16
_BINS = 1 << 16
_GUESSED = 4  # neighbouring ranges for which lower halves are counted in the first sweep
_WAYS = 4  # tables that take turns in counting upper halves
_FLUSH = 1 << 30  # elements after which a thread's 32-bit counts are added to the common ones


def task_vectors(chunk: Chunk[Any]) -> Values:
    """The values that most statistics are about, (n, L): an array where compiled loops can make it."""
    raw = stored(chunk)
    return chunk.deltas if raw is None else stored_deltas(raw)[0]


def models(chunk: Chunk[Any]) -> Tensor:
    """The models themselves, by a name by which they are known."""
    return chunk.models


def table_bytes(rows: int, ranks: int) -> int:
    """What a thread needs to look for so many order statistics of each row."""
    return 4 * _BINS * rows * (_WAYS + _GUESSED * ranks)


class OrderStatistic:
    """Exact order statistics of each row of `f(chunk)` over all elements of the unit.

    Args:
        f: chunk -> values (rows, L) or (L,), a tensor or an array.
        ranks: 0-based ranks in ascending order of value: one list for all rows, or one list per row.
        absolute: rank magnitudes.

    The result has shape (rows, number of ranks) in the arithmetic dtype. `below` and `upto`, of the same shape, then
    count the entries less than, and not greater than, each of them. -0.0 counts as below +0.0.
    """

    def __init__(
        self,
        f: Callable[[Chunk[Any]], Values],
        *,
        ranks: Sequence[int] | Sequence[Sequence[int]],
        absolute: bool = False,
    ) -> None:
        self._f, self._ranks, self._absolute = f, ranks, absolute
        self._lock = threading.Lock()
        self.sweeps = 1
        self.result: Any = np.empty(0)
        self.below: Any = np.empty(0, np.int64)
        self.upto: Any = self.below

    def begin(self, numel: int) -> None:
        self._numel = numel
        self._kept: list[np.ndarray] | None = [] if numel <= _KEEP else None
        self._search: _Search32 | _Search64 | None = None

    def sample(self, chunk: Chunk[Any]) -> None:
        """Look at elements from all over the unit before the first sweep (float32 only gains by it)."""
        values = in_rows(chunk.computed(self._f))
        search = self._begun(values)
        if isinstance(search, _Search32):
            values = array(values if isinstance(values, np.ndarray) else values.cpu())
            search.guess(abs(values) if self._absolute else values, self._numel)

    def observe(self, chunk: Chunk[Any]) -> None:
        if self._kept is None and self._f is task_vectors and self._absolute:
            raw = stored(chunk)
            if raw is not None:
                search = self._begun_for(chunk.n, 4)
                assert isinstance(search, _Search32)
                search.count_stored(raw)
                return
        values = in_rows(chunk.computed(self._f))
        if self._kept is not None:
            values = array(values if isinstance(values, np.ndarray) else values.cpu())
            kept = abs(values) if self._absolute else values.copy()
            with self._lock:
                self._kept.append(kept)
        else:
            self._begun(values).count(values, self._absolute)

    def _begun(self, values: Any) -> _Search32 | _Search64:
        return self._begun_for(values.shape[0], values.itemsize)

    def _begun_for(self, rows: int, itemsize: int) -> _Search32 | _Search64:
        with self._lock:
            if self._search is None:
                self._search = (_Search32 if itemsize == 4 else _Search64)(self._targets(rows))
            return self._search

    def _targets(self, rows: int) -> list[list[int]]:
        if self._ranks and isinstance(self._ranks[0], Sequence):
            return [list(r) for r in self._ranks]  # type: ignore[arg-type]
        return [list(self._ranks) for _ in range(rows)]  # type: ignore[arg-type]

    def finish(self) -> bool:
        if self._kept is not None:
            ordered = np.sort(np.concatenate(self._kept, 1), axis=1)
            self.result = np.take_along_axis(ordered, np.array(self._targets(len(ordered))), 1)
            pairs = list(zip(ordered, self.result, strict=True))
            self.below = np.stack([np.searchsorted(row, found) for row, found in pairs])
            self.upto = np.stack([np.searchsorted(row, found, side="right") for row, found in pairs])
            self._kept = None
            return True
        assert self._search is not None
        if not self._search.finish():
            return False
        self.result, self.below, self.upto = self._search.result, self._search.below, self._search.upto
        self._search = None
        return True


class _Tables:
    """Counts of one thread: 32 bits wide, so that a few of them fit the cache."""

    def __init__(self, rows: int, ranges: int, width: int) -> None:
        self.top = np.zeros((rows, _WAYS, _BINS), np.int32)
        self.low = np.zeros((rows, ranges, width, _BINS), np.int32)
        self.seen = 0


class _Search32:
    """Two levels of 16 bits. `firsts[row, i]` is the first of the ranges whose lower halves are counted for rank i."""

    def __init__(self, targets: list[list[int]]) -> None:
        self._targets = targets
        self._rows, self._count = len(targets), len(targets[0])
        self._lock = threading.Lock()
        self._threads: dict[int, _Tables] = {}
        self._firsts: Any = np.zeros((self._rows, 0), np.uint32)
        self._width = _GUESSED
        self._likely: Any = np.zeros_like(self._firsts)  # keys that the wanted values may well have
        self._top = np.zeros((self._rows, _BINS), np.int64)
        self._clear_low()

    def _clear_low(self) -> None:
        self._low = np.zeros((self._rows, self._firsts.shape[1], self._width, _BINS), np.int64)

    def guess(self, values: np.ndarray, numel: int) -> None:
        ordered = np.sort(values, axis=1)
        seen = ordered.shape[1]
        firsts = np.zeros((self._rows, self._count), np.uint32)
        likely = np.zeros_like(firsts)
        for row, ranks in enumerate(self._targets):
            for i, rank in enumerate(ranks):
                share = (rank + 0.5) / numel
                # Centred on the sample's own order statistic: it is off by a range or two at most where the
                # distribution is dense, and where it is not, a second sweep is what it takes.
                value = ordered[row, min(int(share * seen), seen - 1)]
                likely[row, i] = _key32(np.array([value], np.float32))[0]
                head = int(likely[row, i]) >> 16
                firsts[row, i] = min(max(head - (_GUESSED - 1) // 2, 0), _BINS - _GUESSED)
        self._firsts, self._likely = firsts, likely
        self._clear_low()

    def count(self, values: Any, absolute: bool) -> None:
        tables = self._own()
        tables.seen += values.shape[1]
        if fused(values):
            from regraft.merge.native import tally32

            mask = np.uint32(0x7FFFFFFF if absolute else 0xFFFFFFFF)
            raw = bits(array(values))
            for row in range(self._rows):
                tally32(raw[row], mask, self._firsts[row], self._likely[row], tables.top[row], tables.low[row])
        else:
            self._count_in_torch(values.abs() if absolute else values, tables)
        if tables.seen > _FLUSH:
            self._flush(tables)

    def count_stored(self, raw: Any) -> None:
        """Count the magnitudes of the task vectors of models and base as they are stored, (n + 1, L)."""
        from regraft.merge.native_sparse import tally

        tables = self._own()
        tables.seen += raw.shape[1]
        tally(raw, self._firsts, self._likely, tables.top, tables.low)
        if tables.seen > _FLUSH:
            self._flush(tables)

    def _count_in_torch(self, values: Tensor, tables: _Tables) -> None:
        raw = values.contiguous().view(torch.int32).to(torch.int64)
        keys = torch.where(raw < 0, ~raw & 0xFFFFFFFF, raw | 0x80000000)
        heads, rest = keys >> 16, keys & 0xFFFF
        for row in range(self._rows):
            tables.top[row, 0] += torch.bincount(heads[row], minlength=_BINS).cpu().numpy().astype(np.int32)
            for i, first in enumerate(self._firsts[row].tolist()):
                for j in range(self._width):
                    inside = rest[row][heads[row] == first + j]
                    tables.low[row, i, j] += torch.bincount(inside, minlength=_BINS).cpu().numpy().astype(np.int32)

    def _own(self) -> _Tables:
        thread = threading.get_ident()
        with self._lock:
            if thread not in self._threads:
                self._threads[thread] = _Tables(self._rows, self._firsts.shape[1], self._width)
            return self._threads[thread]

    def _flush(self, tables: _Tables) -> None:
        with self._lock:
            self._top += tables.top.sum(1, dtype=np.int64)
            self._low += tables.low
        tables.top[:], tables.low[:], tables.seen = 0, 0, 0

    def finish(self) -> bool:
        for tables in self._threads.values():
            self._flush(tables)
        self._threads.clear()
        heads = np.zeros((self._rows, self._count), np.int64)
        before, found = np.zeros_like(heads), np.zeros_like(heads)
        missing = False
        below, upto = np.zeros_like(heads), np.zeros_like(heads)
        for row, ranks in enumerate(self._targets):
            cumulative = self._top[row].cumsum()
            for i, rank in enumerate(ranks):
                head = int(np.searchsorted(cumulative, rank, side="right"))
                heads[row, i] = head
                before[row, i] = cumulative[head - 1] if head else 0
                offset = head - int(self._firsts[row, i]) if self._firsts.shape[1] else -1
                if not 0 <= offset < self._width:
                    missing = True
                    continue
                inner = self._low[row, i, offset].cumsum()
                rest = int(np.searchsorted(inner, rank - before[row, i], side="right"))
                found[row, i] = head << 16 | rest
                below[row, i] = before[row, i] + (inner[rest - 1] if rest else 0)
                upto[row, i] = before[row, i] + inner[rest]
        if missing:
            # The upper halves are known: the next sweep counts lower halves of exactly these ranges. It counts upper
            # halves again, which costs less than another loop would.
            self._firsts, self._width = heads.astype(np.uint32), 1
            self._likely = self._firsts << np.uint32(16)
            self._top[:] = 0
            self._clear_low()
            return False
        self.result = _value32(found.astype(np.uint32))
        self.below, self.upto = below, upto
        return True


class _Search64:
    """Four levels of 16 bits for float64: a sweep each."""

    def __init__(self, targets: list[list[int]]) -> None:
        self._targets = [list(ranks) for ranks in targets]
        self._rows = len(targets)
        self._lock = threading.Lock()
        self._shift = 48
        self._heads = np.zeros((self._rows, len(targets[0])), np.uint64)
        self._tables = np.zeros((*self._heads.shape, _BINS), np.int64)
        self._below = np.zeros(self._heads.shape, np.int64)

    def count(self, values: Any, absolute: bool) -> None:
        from regraft.merge.native import tally64

        values = array(values if isinstance(values, np.ndarray) else values.cpu())
        raw = bits(abs(values) if absolute else values)
        tables = np.zeros(self._tables.shape, np.int32)
        for row in range(self._rows):
            tally64(raw[row], self._shift, self._heads[row], tables[row])
        with self._lock:
            self._tables += tables

    def finish(self) -> bool:
        same = np.zeros_like(self._below)
        for row, ranks in enumerate(self._targets):
            for i, rank in enumerate(ranks):
                cumulative = self._tables[row, i].cumsum()
                digit = int(np.searchsorted(cumulative, rank, side="right"))
                before = int(cumulative[digit - 1]) if digit else 0
                ranks[i] = rank - before
                self._below[row, i] += before
                same[row, i] = int(cumulative[digit]) - before
                self._heads[row, i] = (int(self._heads[row, i]) << 16) | digit
        self._shift -= 16
        self._tables[:] = 0
        if self._shift >= 0:
            return False
        keys = self._heads
        raw = np.where(keys >> np.uint64(63), keys ^ np.uint64(1 << 63), ~keys)
        self.result = raw.view(np.float64)
        self.below, self.upto = self._below, self._below + same
        return True


def _key32(values: Any) -> Any:
    """Unsigned integers in the same order as the floats."""
    raw = values.view(np.uint32)
    return np.where(raw >> 31, ~raw, raw | np.uint32(0x80000000))


def _value32(keys: Any) -> Any:
    raw = np.where(keys >> 31, keys ^ np.uint32(0x80000000), ~keys)
    return raw.view(np.float32)
