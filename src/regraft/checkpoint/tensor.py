"""The contract between models on disk and everything that computes on them.

A tensor is a name, a shape, a dtype and a way to read a slice of it; nothing is in memory until `read` is called.
Slices are flat: elements `[start, stop)` in row-major order, which is what elementwise work needs and what a
file offers without seeking.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from regraft.checkpoint.dtypes import DTYPES, array_dtype, as_array, as_tensor, dtype_name, item_size

if TYPE_CHECKING:
    import torch


@runtime_checkable
class TensorSource(Protocol):
    """One tensor that can be read in slices. Implementations are thread-safe.

    A source may know its dtype without torch, as `stored` (see `stored_dtype`), may fill memory that it is given:
    `read_into(out, start)` with a flat array of `array_dtype(stored)`, and may say that this takes no torch, by a true
    `bare`.
    """

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


class StoredTensor:
    """A tensor that is in memory as an array of `array_dtype(stored)`, behind the same contract."""

    bare = True

    def __init__(self, name: str, shape: tuple[int, ...], stored: str, values: np.ndarray) -> None:
        self.name, self.shape, self.stored = name, shape, stored
        self._flat = values.reshape(-1)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return as_tensor(self._flat[start:stop], self.stored)

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[:] = self._flat[start : start + len(out)]


def numel(source: TensorSource) -> int:
    """Number of elements of a source."""
    n = 1
    for size in source.shape:
        n *= size
    return n


def stored_dtype(source: TensorSource) -> str:
    """The dtype of a source by its name in safetensors."""
    return getattr(source, "stored", None) or dtype_name(source.dtype)


def read_array(source: TensorSource, start: int = 0, stop: int | None = None) -> Any:
    """What `source.read` gives, as an array of `array_dtype(stored_dtype(source))`; without torch if it is a file's."""
    into = getattr(source, "read_into", None)
    if into is None:
        return as_array(source.read(start, stop))
    start, stop, _ = slice(start, stop).indices(numel(source))
    values = np.empty(max(stop - start, 0), array_dtype(stored_dtype(source)))
    into(values, start)
    return values


def nbytes(source: TensorSource) -> int:
    """Size of a source in bytes."""
    return numel(source) * item_size(stored_dtype(source))


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The same slice of several tensors of one dtype, as it is stored: `array` is (n, L) of `array_dtype(dtype)`."""

    array: Any
    dtype: str

    def __len__(self) -> int:
        return len(self.array)

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The same memory as a tensor, (n, L)."""
        return as_tensor(self.array, self.dtype)


class Scratch(threading.local):
    """Memory of one thread that is used again and again, where what was in it is no longer needed.

    Blocks of a few megabytes of changing sizes would otherwise leave holes that add up.
    """

    def __init__(self) -> None:
        self._memory: Any = np.empty(0, np.uint8)

    def rows(self, n: int, length: int, dtype: str) -> Any:
        """Uninitialised (n, length) of `array_dtype(dtype)`; what was given out before is overwritten."""
        nbytes = n * length * item_size(dtype)
        if len(self._memory) < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(array_dtype(dtype)).reshape(n, length)


def read_rows(
    sources: Sequence[TensorSource], start: int, stop: int, scratch: Scratch | None = None
) -> StoredRows | list[torch.Tensor]:
    """Elements `[start, stop)` of several sources: in one piece if they have one dtype, else a tensor for each.

    With a `scratch` the memory is valid until its next use by this thread.
    """
    dtype = stored_dtype(sources[0])
    if any(stored_dtype(source) != dtype for source in sources):
        return [source.read(start, stop) for source in sources]
    n, length = len(sources), stop - start
    rows = scratch.rows(n, length, dtype) if scratch is not None else np.empty((n, length), array_dtype(dtype))
    for row, source in zip(rows, sources, strict=True):
        into = getattr(source, "read_into", None)  # files can do without a copy
        if into is not None:
            into(row, start)
        else:
            row[:] = as_array(source.read(start, stop))
    return StoredRows(rows, dtype)
