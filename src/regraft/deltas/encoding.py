"""How the difference of one tensor is stored, slice by slice; `checkpoint.delta_tensor` reads it.

`dense` is the difference in the fine-tune's own dtype. Between two numbers of one format that are within a factor of
two of each other it is exact; where base plus difference does not round to the fine-tune's own bits, the entry is
marked and its value stored, so that all entries come back whatever the dtype. `sparse` marks the entries that changed
most and stores their differences. `bits` is BitDelta (arXiv:2402.10193) before its scales are trained: a sign for each
entry and one scale for the tensor, the mean of the absolute changes, which is nearest to them in least squares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint import TensorSource, TensorSpec
from regraft.checkpoint.delta_record import Encoding
from regraft.checkpoint.delta_tensor import added, arithmetic, slices
from regraft.checkpoint.dtypes import dtype_name
from regraft.checkpoint.onebit import rises, stepped
from regraft.checkpoint.packing import pack, packed_size
from regraft.checkpoint.tensor import stored_dtype
from regraft.merge.rule import Chunk, TensorInfo
from regraft.merge.selection import OrderStatistic, task_vectors
from regraft.methods import Options

Write = Callable[[str, int, Tensor], None]


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two flat tensors of one dtype agree in every bit."""
    return (a.view(torch.uint8).view(-1, a.itemsize) == b.view(torch.uint8).view(-1, b.itemsize)).all(1)


def rounded(delta: Tensor, dtype: torch.dtype) -> Tensor:
    """A difference as it is stored; 0 where it is too large for the dtype, which the marks then put right."""
    stored = delta.to(dtype)
    return torch.where(torch.isfinite(stored.to(delta.dtype)), stored, torch.zeros_like(stored))


class Dense:
    """Writes differences, and the values of the entries that they do not give back; `odd` is the number of those."""

    encoding: Encoding = "dense"

    def __init__(self, name: str, model: TensorSource, odd: int) -> None:
        self.name, self._dtype, self._odd = name, model.dtype, odd
        self._filled = 0
        self.specs = [TensorSpec(f"delta/{name}", model.shape, stored_dtype(model))]
        if odd:
            self.specs += _marked(name, model, odd)

    def write(self, write: Write, start: int, base: Tensor, model: Tensor, delta: Tensor) -> Tensor:
        """Store a slice, and return what it gives back. `base` and `delta` are in the arithmetic dtype."""
        stored = rounded(delta, self._dtype)
        write(f"delta/{self.name}", start, stored)
        restored = added(base, stored.to(base.dtype), 1.0, self._dtype)
        if self._odd:
            odd = ~same_bits(restored, model)
            self._filled = _write_marked(write, self.name, start, odd, model, self._filled)
            restored = torch.where(odd, model, restored)
        return restored


class SparseDelta:
    """Writes the `kept` largest differences; of equal ones at the threshold, those that come first."""

    encoding: Encoding = "sparse"

    def __init__(self, name: str, model: TensorSource, threshold: float, above: int, kept: int) -> None:
        self.name, self._dtype, self._threshold = name, model.dtype, threshold
        self._ties = kept - above
        self._filled = 0
        self.specs = _marked(name, model, kept)

    def write(self, write: Write, start: int, base: Tensor, model: Tensor, delta: Tensor) -> Tensor:
        """As `Dense.write`."""
        size = delta.abs()
        tied = size == self._threshold
        chosen = (size > self._threshold) | (tied & (tied.cumsum(0) <= self._ties))
        self._ties -= int((chosen & tied).sum())
        stored = rounded(delta, self._dtype)
        self._filled = _write_marked(write, self.name, start, chosen, stored, self._filled)
        change = torch.where(chosen, stored.to(base.dtype), torch.zeros_like(base))
        return added(base, change, 1.0, self._dtype)


class Bits:
    """Writes the signs of the differences (1 for those above 0) and their mean size."""

    encoding: Encoding = "bits"

    def __init__(self, name: str, model: TensorSource, scale: float) -> None:
        self.name, self._dtype = name, model.dtype
        self._scale = torch.tensor([scale], dtype=torch.float32)
        numel = TensorInfo(name, model.shape).numel
        self.specs = [
            TensorSpec(f"signs/{name}", (packed_size(numel),), "U8"),
            TensorSpec(f"scale/{name}", (1,), "F32"),
        ]

    def write(self, write: Write, start: int, base: Tensor, model: Tensor, delta: Tensor) -> Tensor:
        """As `Dense.write`."""
        up = rises(delta)
        write(f"signs/{self.name}", start // 8, pack(up))
        if start == 0:
            write(f"scale/{self.name}", 0, self._scale)
        return added(base, stepped(up, self._scale.to(base.dtype)), 1.0, self._dtype)


class Whole:
    """A tensor that is stored as it is."""

    encoding: Encoding = "whole"

    def __init__(self, name: str, model: TensorSource) -> None:
        self.specs = [TensorSpec(f"whole/{name}", model.shape, stored_dtype(model))]


Encoder = Dense | SparseDelta | Bits


def largest(name: str, base: TensorSource, model: TensorSource, kept: int) -> tuple[float, int]:
    """The size of the change that `kept` entries of a tensor reach, and how many exceed it."""
    info = TensorInfo(name, model.shape)
    found = OrderStatistic(task_vectors, ranks=[info.numel - kept], absolute=True)
    found.begin(info.numel)
    done = False
    while not done:
        for start, stop in slices(info.numel):
            rows = [model.read(start, stop), base.read(start, stop)]
            dtype = dtype_name(arithmetic(model.dtype, base.dtype))
            found.observe(Chunk[Any](info, Options(), start, rows, True, dtype))
        done = found.finish()
    return float(found.result[0, 0]), info.numel - int(found.upto[0, 0])


def _marked(name: str, model: TensorSource, count: int) -> list[TensorSpec]:
    numel = TensorInfo(name, model.shape).numel
    return [
        TensorSpec(f"marks/{name}", (packed_size(numel),), "U8"),
        TensorSpec(f"values/{name}", (count,), stored_dtype(model)),
    ]


def _write_marked(write: Write, name: str, start: int, chosen: Tensor, values: Tensor, filled: int) -> int:
    """Store marks and the values at them, and return how many values there are now."""
    kept = values[chosen]
    write(f"marks/{name}", start // 8, pack(chosen))
    write(f"values/{name}", filled, kept)
    return filled + kept.numel()
