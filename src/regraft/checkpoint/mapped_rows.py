"""A tensor whose rows come from other places: an embedding in the order of another vocabulary, gathered when read.

Nothing is kept but which row comes from where. A read of a slice goes run by run: rows that follow one another in the
same source are one read, and go straight into the caller's memory where that can be done. "Row" is what belongs to one
entry of the axis that is mapped; before it there may be other axes, each of whose entries has all rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from regraft.checkpoint.dtypes import array_dtype, as_array, as_tensor, dtype_name
from regraft.checkpoint.tensor import TensorSource, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor

# What a row can be beside a row of a source: nothing, the mean of rows of several sources, the mean of all tokens.
ZERO, MEAN, AVERAGE = -1, -2, -3
_PIECE = 1 << 20  # elements at a time, where a mean takes a pass over the tensor


@dataclass(frozen=True)
class RowMap:
    """Where each row comes from.

    Attributes:
        origin: (rows,) number of a source, or ZERO, MEAN, AVERAGE.
        row: (rows,) the row of that source; for MEAN the number of an entry of `means`.
        means: for each mean the (source, row) that it is made of.
        tokens: AVERAGE is the mean of the rows before this one.
    """

    origin: np.ndarray
    row: np.ndarray
    means: Sequence[Sequence[tuple[int, int]]] = ()
    tokens: int = 0

    def is_identity(self, source: int, rows: int) -> bool:
        """Whether this is nothing but the `rows` rows of one source, in their order."""
        same = len(self.row) == rows and bool((self.origin == source).all())
        return same and bool((self.row == np.arange(rows)).all())

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The rows `[first, last)` in pieces [begin, end) whose rows follow one another in one source."""
        origin, row = self.origin[first:last], self.row[first:last]
        joined = (origin[1:] == origin[:-1]) & ((row[1:] == row[:-1] + 1) | (origin[1:] == ZERO))
        cuts = [first, *(np.flatnonzero(~joined) + first + 1).tolist(), last]
        yield from pairwise(cuts)


class MappedRows:
    """Rows of `sources` in the order of a map, as one tensor.

    Args:
        name: of the tensor.
        sources: tensors that differ in nothing but dtype and the length of `axis`.
        rows: which row comes from where.
        axis: the dimension that `rows` counts.
        dtype: of what is read. Rows of another dtype are converted; means are made in float64 and rounded once.
    """

    def __init__(
        self, name: str, sources: Sequence[TensorSource], rows: RowMap, *, axis: int, dtype: torch.dtype
    ) -> None:
        shape = sources[0].shape
        self.name, self.dtype, self.stored = name, dtype, dtype_name(dtype)
        self.shape = (*shape[:axis], len(rows.origin), *shape[axis + 1 :])
        self._sources, self._map = sources, rows
        self._lengths = [source.shape[axis] for source in sources]
        self._width = _product(shape[axis + 1 :])
        self._block = len(rows.origin) * self._width  # elements for each entry of the axes before
        self._numel = _product(self.shape)
        self._averages: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)` in row-major order; see `TensorSource.read`."""
        start, stop, _ = slice(start, stop).indices(self._numel)
        out = np.empty(max(stop - start, 0), array_dtype(self.stored))
        self.read_into(out, start)
        return as_tensor(out, self.stored)

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out`, a flat array of `array_dtype(stored)`, with the elements from `start` on."""
        stop = start + len(out)
        while start < stop:
            outer, at = divmod(start, self._block)
            length = min(self._block - at, stop - start)
            self._fill(out[:length], outer, at)
            out, start = out[length:], start + length

    def _fill(self, out: np.ndarray, outer: int, start: int) -> None:
        """Elements `[start, start + len(out))` of one entry of the axes before."""
        width, stop = self._width, start + len(out)
        for begin, end in self._map.runs(start // width, -(-stop // width)):
            low, high = max(begin * width, start), min(end * width, stop)
            piece = out[low - start : high - start]
            origin, row = int(self._map.origin[begin]), int(self._map.row[begin])
            if origin >= 0:
                self._copy(piece, origin, (outer * self._lengths[origin] + row - begin) * width + low)
            elif origin == ZERO:
                piece[:] = 0
            else:  # runs of means are taken apart: there are few of them
                for one in range(begin, end):
                    left, right = max(one * width, low), min((one + 1) * width, high)
                    mean = self._average(outer) if origin == AVERAGE else self._mean(outer, row + one - begin)
                    out[left - start : right - start] = mean[left - one * width : right - one * width]

    def _copy(self, piece: np.ndarray, origin: int, at: int) -> None:
        source = self._sources[origin]
        into = getattr(source, "read_into", None)
        if into is not None and stored_dtype(source) == self.stored:
            into(piece, at)
        else:
            piece[:] = as_array(source.read(at, at + len(piece)).to(self.dtype))

    def _mean(self, outer: int, number: int) -> np.ndarray:
        rows = []
        for origin, row in self._map.means[number]:
            at = (outer * self._lengths[origin] + row) * self._width
            rows.append(self._sources[origin].read(at, at + self._width).to(torch.float64))
        return as_array(torch.stack(rows).mean(0).to(self.dtype))

    def _average(self, outer: int) -> np.ndarray:
        """The mean of the rows of all tokens, added up in pieces that do not depend on what is read."""
        with self._lock:
            if outer not in self._averages:
                total = torch.zeros(self._width, dtype=torch.float64)
                step = max(_PIECE // self._width, 1)
                for first in range(0, self._map.tokens, step):
                    rows = min(step, self._map.tokens - first)
                    piece = np.empty(rows * self._width, array_dtype(self.stored))
                    self._fill(piece, outer, first * self._width)
                    total += as_tensor(piece, self.stored).view(rows, self._width).to(torch.float64).sum(0)
                self._averages[outer] = as_array((total / self._map.tokens).to(self.dtype))
            return self._averages[outer]

    def __repr__(self) -> str:
        return f"MappedRows({self.name!r}, {self.shape}, {self.dtype})"


def common_dtype(sources: Sequence[TensorSource]) -> torch.dtype:
    """A float dtype that holds the values of all of them."""
    found = {source.dtype for source in sources}
    if len(found) == 1:
        return found.pop()
    return torch.float64 if torch.float64 in found else torch.float32


def _product(sizes: Sequence[int]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n
