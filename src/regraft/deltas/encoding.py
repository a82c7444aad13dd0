"""How the difference of one tensor is stored, written and read back slice by slice.

`dense` is the difference in the fine-tune's own dtype. Between two numbers of one format that are within a factor of
two of each other it is exact; where base plus difference does not round to the fine-tune's own bits, the entry is
marked and its value stored, so that all entries come back whatever the dtype. `sparse` marks the entries that changed
most and stores their differences. `bits` is BitDelta (arXiv:2402.10193) before its scales are trained: a sign for each
entry and one scale for the tensor, the mean of the absolute changes, which is nearest to them in least squares.

What is stored of a tensor is called by the part's name, a slash, and the tensor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint import BLOCK, TensorSource, TensorSpec
from regraft.deltas.packing import pack, packed_size, unpack
from regraft.deltas.record import Encoding
from regraft.errors import UserError
from regraft.merge.onebit import rises, stepped
from regraft.merge.rule import Chunk, TensorInfo
from regraft.merge.selection import OrderStatistic, task_vectors
from regraft.methods import Options

SLICE = 64 * BLOCK  # a multiple of 8, so that slices begin at a byte of marks and signs
Parts = Mapping[str, TensorSource]
Write = Callable[[str, int, Tensor], None]


def slices(numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the pieces in which tensors are read."""
    return ((start, min(start + SLICE, numel)) for start in range(0, numel, SLICE))


def arithmetic(*dtypes: torch.dtype) -> torch.dtype:
    """What is computed in: float64 if one of the tensors is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def added(base: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """base + scale x delta, rounded once; `base` and `delta` in the arithmetic dtype."""
    return (base + scale * delta).to(dtype)


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
        self.specs = [TensorSpec(f"delta/{name}", model.shape, model.dtype)]
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
            TensorSpec(f"signs/{name}", (packed_size(numel),), torch.uint8),
            TensorSpec(f"scale/{name}", (1,), torch.float32),
        ]

    def write(self, write: Write, start: int, base: Tensor, model: Tensor, delta: Tensor) -> Tensor:
        """As `Dense.write`."""
        up = rises(delta)
        write(f"signs/{self.name}", start // 8, pack(up))
        if start == 0:
            write(f"scale/{self.name}", 0, self._scale)
        return added(base, stepped(up, self._scale.to(base.dtype)), 1.0, self._dtype)


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
            dtype = arithmetic(model.dtype, base.dtype)
            found.observe(Chunk[Any](info, Options(), start, rows, True, dtype))
        done = found.finish()
    return float(found.result[0, 0]), info.numel - int(found.upto[0, 0])


def restored(
    parts: Parts, name: str, shape: tuple[int, ...], dtype: torch.dtype, encoding: str, base: TensorSource, scale: float
) -> Iterator[tuple[int, Tensor]]:
    """A tensor of base plus delta, in slices from the first to the last: (first element, values).

    Raises:
        UserError: RG112 if what is stored is not what the encoding needs.
    """
    numel = TensorInfo(name, shape).numel
    size = packed_size(numel)
    wide = arithmetic(dtype, base.dtype)
    delta = _part(parts, "delta", name, shape, dtype) if encoding == "dense" else None
    marked = encoding == "sparse" or (encoding == "dense" and f"marks/{name}" in parts)
    marks = _part(parts, "marks", name, (size,), torch.uint8) if marked else None
    values = _part(parts, "values", name, None, dtype) if marked else None
    signs = _part(parts, "signs", name, (size,), torch.uint8) if encoding == "bits" else None
    factor = _part(parts, "scale", name, (1,), torch.float32).read() if encoding == "bits" else None
    filled = 0
    for start, stop in slices(numel):
        own = base.read(start, stop).to(wide)
        at = slice(start // 8, packed_size(stop))
        if signs is not None and factor is not None:
            change = stepped(unpack(signs.read(at.start, at.stop), stop - start), factor.to(wide))
        else:
            change = delta.read(start, stop).to(wide) if delta is not None else torch.zeros_like(own)
        if marks is not None and values is not None:
            chosen = unpack(marks.read(at.start, at.stop), stop - start)
            count = int(chosen.sum())
            if filled + count > values.shape[0]:
                raise _damaged(name, "it has fewer values than marks")
            kept = values.read(filled, filled + count)
            filled += count
            change[chosen] = kept.to(wide) if delta is None else kept.to(wide) - own[chosen]
            result = added(own, change, scale, dtype)
            if delta is not None and scale == 1:
                result[chosen] = kept
        else:
            result = added(own, change, scale, dtype)
        yield start, result
    if values is not None and filled != values.shape[0]:
        raise _damaged(name, "it has more values than marks")


def whole(parts: Parts, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSource:
    """A tensor that is stored as it is.

    Raises:
        UserError: RG112 if it is not there.
    """
    return _part(parts, "whole", name, shape, dtype)


def _marked(name: str, model: TensorSource, count: int) -> list[TensorSpec]:
    numel = TensorInfo(name, model.shape).numel
    return [
        TensorSpec(f"marks/{name}", (packed_size(numel),), torch.uint8),
        TensorSpec(f"values/{name}", (count,), model.dtype),
    ]


def _write_marked(write: Write, name: str, start: int, chosen: Tensor, values: Tensor, filled: int) -> int:
    """Store marks and the values at them, and return how many values there are now."""
    kept = values[chosen]
    write(f"marks/{name}", start // 8, pack(chosen))
    write(f"values/{name}", filled, kept)
    return filled + kept.numel()


def _part(parts: Parts, part: str, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> TensorSource:
    """A stored part, of the shape and dtype that it must have; any vector if `shape` is None."""
    found = parts.get(f"{part}/{name}")
    if found is None:
        raise _damaged(name, f"its {part} is missing")
    fits = len(found.shape) == 1 if shape is None else found.shape == shape
    if not fits or found.dtype != dtype:
        raise _damaged(name, f"its {part} has shape {list(found.shape)} and dtype {found.dtype}")
    return found


def _damaged(name: str, what: str) -> UserError:
    fix = "download or extract the delta again"
    return UserError("RG112", f"the delta of {name} is damaged: {what}", where="delta.json", fix=fix)
