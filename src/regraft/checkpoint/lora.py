"""Tensors of a base model with an adapter's change added, computed when a slice is read.

Nothing is kept: a read costs the slice of the base, the adapter's factors, and one small matrix product. The result is
the same bits however a range is cut, because a floating-point product depends on the shape of the matrices: rows are
therefore always computed in the same groups, counted from the first row of the tensor, and a read takes what it needs
out of them. The price is up to two half-used groups of 65536 elements per read. Arithmetic is in float32 (float64 for a
float64 base), and the sum is rounded once, to the dtype of the base.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from regraft.checkpoint.delta_tensor import DeltaTensor
from regraft.checkpoint.tensor import TensorSource, numel

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 1 << 16  # elements per group of rows, at least one row


class _Rowwise(ABC):
    """A tensor seen as a matrix (rows, cols), computed from the rows of a base of the same shape and dtype."""

    def __init__(self, base: TensorSource) -> None:
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self._base = base
        self._rows = base.shape[0]
        self._cols = max(numel(base) // max(self._rows, 1), 1)
        self._per_group = max(_GROUP // self._cols, 1)
        self._work = torch.float64 if base.dtype == torch.float64 else torch.float32

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)` in row-major order; see `TensorSource.read`."""
        start, stop, _ = slice(start, stop).indices(self._rows * self._cols)
        out = torch.empty(max(stop - start, 0), dtype=self.dtype)
        if stop <= start:
            return out
        step = self._per_group * self._cols
        shared = self._shared()
        for begin in range(start // step * step, stop, step):
            first = begin // self._cols
            rows = self._compute(first, min(first + self._per_group, self._rows), shared).reshape(-1)
            low, high = max(start, begin), min(stop, begin + step)
            out[low - start : high - start] = rows[low - begin : high - begin]
        return out

    def unrounded(self) -> TensorSource:
        """The same tensor in the dtype of its arithmetic: a bfloat16 base then has the change in float32 on top."""
        twin = copy.copy(self)
        twin.dtype = self._work
        if isinstance(self._base, _Rowwise):
            twin._base = self._base.unrounded()
        return twin

    def _shared(self) -> Tensor:
        """What all groups of one read need."""
        return torch.empty(0)

    @abstractmethod
    def _compute(self, first: int, last: int, shared: Tensor) -> Tensor:
        """Rows `[first, last)` in the dtype of the arithmetic, shape (last - first, cols)."""

    def _base_rows(self, first: int, last: int) -> Tensor:
        flat = self._base.read(first * self._cols, last * self._cols)
        return flat.to(self._work).view(last - first, self._cols)


class LoraTensor(_Rowwise):
    """`base + scaling * (up @ down)`, for DoRA rescaled to learned norms.

    Args:
        base: the weight W: (out, in) of a linear layer, (in, out) of a transposed one, (tokens, dim) of an embedding,
            (out, in, kernel...) of a convolution.
        down: A, (r, in) or (r, in, kernel...).
        up: B, (out, r) or (out, r, 1...).
        scaling: a finite factor.
        transposed: W is stored (in, out), so that `(up @ down).T` is added. Embeddings are of this kind.
        magnitude: DoRA's vector with one norm per output, `out` elements in any shape; the weight of output o becomes
            `magnitude[o] * (W + delta)[o] / norm((W + delta)[o])` (Liu et al. 2024, arXiv:2402.09353).
    """

    def __init__(
        self,
        base: TensorSource,
        down: TensorSource,
        up: TensorSource,
        scaling: float,
        *,
        transposed: bool = False,
        magnitude: TensorSource | None = None,
    ) -> None:
        super().__init__(base)
        self._down, self._up, self._scaling = down, up, scaling
        self._transposed, self._magnitude = transposed, magnitude
        self._rank = down.shape[0]
        self._column_norms: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def transposed(self) -> bool:
        return self._transposed

    @property
    def rank(self) -> int:
        return self._rank

    def product(self) -> tuple[float, Tensor, Tensor]:
        """(scaling, B (out, r), A (r, in)) of the change; kernels of convolutions count as inputs."""
        up = self._up.read().view(-1, self._rank)
        return self._scaling, up, self._down.read().view(self._rank, -1)

    def _shared(self) -> Tensor:
        """The factor with all columns, (r, cols), and for DoRA with one norm per column a last row of factors."""
        right = self._right()
        if self._magnitude is None or not self._transposed:
            return right
        with self._lock:
            if self._column_norms is None:
                self._column_norms = self._norms(right)
        factors = self._magnitude.read().to(self._work) / self._column_norms
        return torch.cat([right, factors.unsqueeze(0)])

    def _right(self) -> Tensor:
        if self._transposed:
            return self._up.read().to(self._work).view(self._cols, self._rank).t().contiguous()
        return self._down.read().to(self._work).view(self._rank, self._cols)

    def _compute(self, first: int, last: int, shared: Tensor) -> Tensor:
        rows = self._sum(first, last, shared[: self._rank])
        if self._magnitude is None:
            return rows
        if self._transposed:
            return rows * shared[self._rank]
        norms = rows.double().square().sum(dim=1).sqrt().to(self._work)
        factors = self._magnitude.read(first, last).to(self._work) / norms
        return rows * factors.unsqueeze(1)

    def _sum(self, first: int, last: int, right: Tensor) -> Tensor:
        return torch.addmm(self._base_rows(first, last), self._left(first, last), right, alpha=self._scaling)

    def _left(self, first: int, last: int) -> Tensor:
        """Rows `[first, last)` of the other factor, (rows, r)."""
        if not self._transposed:
            return self._up.read(first * self._rank, last * self._rank).to(self._work).view(last - first, self._rank)
        # `down` is stored (r, rows): one short run out of each of its rows, not the whole of it.
        runs = [self._down.read(k * self._rows + first, k * self._rows + last) for k in range(self._rank)]
        return torch.stack(runs).to(self._work).t().contiguous()

    def _norms(self, right: Tensor) -> Tensor:
        """L2 norm of every column of the sum, (cols,): the one number that takes a pass over the tensor."""
        total = torch.zeros(self._cols, dtype=torch.float64)
        for first in range(0, self._rows, self._per_group):
            rows = self._sum(first, min(first + self._per_group, self._rows), right)
            total += rows.double().square().sum(dim=0)
        return total.sqrt().to(self._work)


class ScaledTensor(_Rowwise):
    """`base` with every row (or column) multiplied by its own factor, as IA3 does (Liu et al. 2022, arXiv:2205.05638).

    Args:
        base: a weight, or a bias as a single row or column.
        factors: as many elements as `base` has rows (`by_row`) or columns.
    """

    def __init__(self, base: TensorSource, factors: TensorSource, *, by_row: bool) -> None:
        super().__init__(base)
        self._factors, self._by_row = factors, by_row

    def _shared(self) -> Tensor:
        return self._factors.read().to(self._work)

    def _compute(self, first: int, last: int, shared: Tensor) -> Tensor:
        rows = self._base_rows(first, last)
        return rows * (shared[first:last].unsqueeze(1) if self._by_row else shared)


class ReplacedRows(_Rowwise):
    """`base` with some rows replaced: trained tokens of an embedding.

    Args:
        base: (tokens, dim).
        rows: (n, dim), the new rows.
        indices: which rows they are, n different ones.
    """

    def __init__(self, base: TensorSource, rows: TensorSource, indices: Sequence[int]) -> None:
        super().__init__(base)
        self._new, self._order = rows, sorted((index, place) for place, index in enumerate(indices))

    def _compute(self, first: int, last: int, shared: Tensor) -> Tensor:
        rows = self._base_rows(first, last).clone()
        for index, place in self._order:
            if first <= index < last:
                rows[index - first] = self._new.read(place * self._cols, (place + 1) * self._cols)
        return rows


class AddedVector:
    """`base + scaling * change`, element by element, rounded once to the dtype of the base."""

    def __init__(self, base: TensorSource, change: TensorSource, scaling: float) -> None:
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self._base, self._change, self._scaling = base, change, scaling

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)`; see `TensorSource.read`."""
        work = torch.float64 if self.dtype == torch.float64 else torch.float32
        change = self._change.read(start, stop).to(work) * self._scaling
        return (self._base.read(start, stop).to(work) + change).to(self.dtype)


class Renamed:
    """The same tensor under another name."""

    def __init__(self, source: TensorSource, name: str) -> None:
        self.name, self.shape, self.dtype = name, source.shape, source.dtype
        self._source = source

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)`; see `TensorSource.read`."""
        return self._source.read(start, stop)


def products(source: TensorSource) -> list[LoraTensor] | None:
    """The changes of the form B A that adapters made to a tensor, [] if it is as it is stored in the base.

    None if it was changed in another way, by DoRA or a delta for example, or replaced.
    """
    found = []
    while isinstance(source, LoraTensor):
        if source._magnitude is not None:
            return None
        found.append(source)
        source = source._base
    return None if isinstance(source, (_Rowwise, AddedVector, DeltaTensor, Renamed)) else found
