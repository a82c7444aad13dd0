"""Tensors of a base with a stored difference added, computed when a slice is read.

What is stored of a tensor is called by the part's name, a slash, and the tensor's name: `delta/x` is the difference in
the fine-tune's dtype, `signs/x` and `scale/x` are a bit per entry and their common size, `marks/x` is a bit per entry
that tells which have a value of their own in `values/x` (beside `delta/x` the fine-tune's own, else the difference),
and `whole/x` is the fine-tune's tensor. Nothing is kept in memory but, for marks, one count per block of entries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from regraft.checkpoint.onebit import stepped
from regraft.checkpoint.packing import pack_mask, packed_size, unpack
from regraft.checkpoint.tensor import BLOCK, TensorSource, numel
from regraft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SLICE = 64 * BLOCK  # a multiple of 8, so that slices begin at a byte of marks and signs
Parts = Mapping[str, TensorSource]
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def slices(count: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the pieces in which tensors are read."""
    return ((start, min(start + SLICE, count)) for start in range(0, count, SLICE))


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in: float64 if one of the tensors is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def added(base: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """base + scale x delta, rounded once; `base` and `delta` in the arithmetic dtype."""
    return (base + scale * delta).to(dtype)


class DeltaTensor:
    """`base + scale * difference`, rounded once to the fine-tune's dtype.

    Args:
        base: of the same shape, and of floats.
        parts: everything that the delta stores.
        name, dtype: of the fine-tune's tensor.
        encoding: "dense", "sparse" or "bits".
        scale: what differences are multiplied by.

    Raises:
        UserError: RG112 if what is stored is not what the encoding needs.
    """

    def __init__(
        self, base: TensorSource, parts: Parts, name: str, dtype: torch.dtype, encoding: str, scale: float = 1.0
    ) -> None:
        self.name, self.shape, self.dtype = name, base.shape, dtype
        self._base, self._scale, self._numel = base, scale, numel(base)
        self._wide = arithmetic(dtype, base.dtype)
        size = (packed_size(self._numel),)
        self._delta = part(parts, "delta", name, base.shape, dtype) if encoding == "dense" else None
        self._marked: _Marked | None = None
        if encoding == "sparse" or (encoding == "dense" and f"marks/{name}" in parts):
            values = part(parts, "values", name, None, dtype)
            self._marked = _Marked(part(parts, "marks", name, size, torch.uint8), values, self._numel, name)
        self._signs = part(parts, "signs", name, size, torch.uint8) if encoding == "bits" else None
        self._size = part(parts, "scale", name, (1,), torch.float32) if encoding == "bits" else None

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `[start, stop)`; see `TensorSource.read`.

        Raises:
            UserError: RG112 if there are more or fewer values than marks.
        """
        start, stop, _ = slice(start, stop).indices(self._numel)
        if stop <= start:
            return torch.empty(0, dtype=self.dtype)
        own = self._base.read(start, stop).to(self._wide)
        if self._signs is not None and self._size is not None:
            up = _bits(self._signs, start, stop)
            return added(own, stepped(up, self._size.read().to(self._wide)), self._scale, self.dtype)
        if self._delta is not None:
            change = self._delta.read(start, stop).to(self._wide, copy=True)
        else:
            change = torch.zeros_like(own)
        if self._marked is None:
            return added(own, change, self._scale, self.dtype)
        chosen, values = self._marked.read(start, stop)
        change[chosen] = values.to(self._wide) if self._delta is None else values.to(self._wide) - own[chosen]
        result = added(own, change, self._scale, self.dtype)
        if self._delta is not None and self._scale == 1:
            result[chosen] = values
        return result


class _Marked:
    """The entries of a tensor that have a value of their own, and these values, packed one after another."""

    def __init__(self, marks: TensorSource, values: TensorSource, count: int, name: str) -> None:
        self._marks, self._values, self._count, self._name = marks, values, count, name
        self._before: Sequence[int] | None = None  # values that belong to the blocks before each block
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Which of the entries [start, stop) are marked, and the values of those."""
        block = start // BLOCK
        chosen = _bits(self._marks, block * BLOCK, stop)
        before, chosen = chosen[: start - block * BLOCK], chosen[start - block * BLOCK :]
        first = self._starts()[block] + int(before.sum())
        return chosen, self._values.read(first, first + int(chosen.sum()))

    def _starts(self) -> Sequence[int]:
        with self._lock:
            if self._before is None:
                self._before = self._counted()
            return self._before

    def _counted(self) -> list[int]:
        """A pass over the marks: an eighth of a byte per entry."""
        counts: list[int] = []
        for start, stop in slices(self._count):
            packed = self._marks.read(start // 8, packed_size(stop)).numpy().copy()
            packed[-1] &= pack_mask(stop)
            blocks = np.arange(0, len(packed), BLOCK // 8)
            counts += np.add.reduceat(_ONES[packed], blocks, dtype=np.int64).tolist()
        total, stored = sum(counts), numel(self._values)
        if total != stored:
            raise damaged(self._name, f"it has {'fewer' if stored < total else 'more'} values than marks")
        return [0, *np.cumsum(counts).tolist()]


def whole(parts: Parts, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSource:
    """A tensor that is stored as it is.

    Raises:
        UserError: RG112 if it is not there.
    """
    return part(parts, "whole", name, shape, dtype)


def part(parts: Parts, kind: str, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> TensorSource:
    """A stored part, of the shape and dtype that it must have; any vector if `shape` is None.

    Raises:
        UserError: RG112 if there is no such part.
    """
    found = parts.get(f"{kind}/{name}")
    if found is None:
        raise damaged(name, f"its {kind} is missing")
    fits = len(found.shape) == 1 if shape is None else found.shape == shape
    if not fits or found.dtype != dtype:
        raise damaged(name, f"its {kind} has shape {list(found.shape)} and dtype {found.dtype}")
    return found


def damaged(name: str, what: str) -> UserError:
    """RG112."""
    fix = "download or extract the delta again"
    return UserError("RG112", f"the delta of {name} is damaged: {what}", where="delta.json", fix=fix)


def _bits(packed: TensorSource, start: int, stop: int) -> Tensor:
    """Bits [start, stop) of what `pack` made."""
    first = start // 8
    return unpack(packed.read(first, packed_size(stop)), stop - 8 * first)[start - 8 * first :]
