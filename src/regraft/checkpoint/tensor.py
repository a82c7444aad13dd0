"""The contract between models on disk and everything that computes on them.

A tensor is a name, a shape, a dtype and a way to read a slice of it; nothing is in memory until `read` is called.
Slices are flat: elements `[start, stop)` in row-major order, which is what elementwise work needs and what a
file offers without seeking.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch

# Names as they stand in safetensors headers.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@runtime_checkable
class TensorSource(Protocol):
    """One tensor that can be read in slices. Implementations are thread-safe."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `[start, stop)` in row-major order, as a 1-D CPU tensor of `dtype`.

        `stop=None` reads to the end. The same elements come out bit for bit however the range is cut,
        as long as cuts fall on multiples of `regraft.checkpoint.BLOCK` elements.
        """
        ...


# Slices that feed computations are cut at multiples of this many elements, so that reductions and vectorised
# kernels see the same groups of elements whatever the chunk size and the number of workers.
BLOCK = 1 << 14


class MemoryTensor:
    """A tensor that is in memory already, behind the same contract."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self._shape = tuple(tensor.shape)
        self._flat = tensor.detach().contiguous().reshape(-1)

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._flat.dtype

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._flat[start:stop]


def numel(source: TensorSource) -> int:
    """Number of elements of a source."""
    n = 1
    for size in source.shape:
        n *= size
    return n


def nbytes(source: TensorSource) -> int:
    """Size of a source in bytes."""
    return numel(source) * source.dtype.itemsize


def main_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype of most of the weights, from dtype and number of elements of each tensor; integers do not count."""
    total: dict[torch.dtype, int] = {}
    for dtype, count in sizes:
        if dtype.is_floating_point:
            total[dtype] = total.get(dtype, 0) + count
    return max(total, key=lambda dtype: total[dtype]) if total else torch.float32


class Scratch(threading.local):
    """Memory of one thread that is used again and again, where what was in it is no longer needed.

    Blocks of a few megabytes of changing sizes would otherwise leave holes that add up.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def rows(self, n: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised (n, length); what was given out before is overwritten."""
        nbytes = n * length * dtype.itemsize
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[:nbytes].view(dtype).view(n, length)


def read_rows(
    sources: Sequence[TensorSource], start: int, stop: int, scratch: Scratch | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Elements `[start, stop)` of several sources: one tensor (n, L) if they have one dtype, else a row for each.

    With a `scratch` the tensor is valid until its next use by this thread.
    """
    first = sources[0].dtype
    if any(source.dtype != first for source in sources):
        return [source.read(start, stop) for source in sources]
    n, length = len(sources), stop - start
    rows = scratch.rows(n, length, first) if scratch is not None else torch.empty((n, length), dtype=first)
    for row, source in zip(rows, sources, strict=True):
        into = getattr(source, "read_into", None)  # files can do without a copy
        if into is not None:
            into(row, start)
        else:
            row.copy_(source.read(start, stop))
    return rows
