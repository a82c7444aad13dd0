"""Writing a model's weights: slices at their final offsets, in any order, from any number of threads.

Headers are written and disk space is reserved before the first slice (see `shards`), the whole appears under its
final name by one rename (see `output`), and only if every element was written. Nothing is buffered: a slice goes from
the caller's tensor to its place in the file, so writing costs no memory beside the slice itself.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch

from regraft.checkpoint.output import OutputFolder, explained
from regraft.checkpoint.shards import INDEX_NAME, SHARD_BYTES, TensorSpec, index, layout, size_on_disk

__all__ = ["ModelWriter", "TensorSpec", "size_on_disk"]

_NO_ALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_OPEN_FILES = 64


class ModelWriter:
    """Writes the weights of one model into `out`; other files of the model are put into `staging` by the caller.

    The constructor checks and creates nothing; entering the context makes the staging folder with all shards at
    their full size. Leaving it without `publish`, by an exception or not, removes all of it again.

    Args:
        out: the folder to make; it may exist if it is empty, or hold a model if `force`.
        specs: the tensors, in the order in which they are best stored; tied copies are left out by the caller.
        shard_bytes: most bytes of tensor data per file; a larger tensor has a file to itself.
        force: replace a model that is in `out` already.
        extra_bytes: room that the caller needs in the staging folder besides the weights.

    Raises:
        UserError: RG401, RG402, RG405 (see `OutputFolder`), before anything is created.
        ValueError: `specs` or `shard_bytes` that no model can have.
    """

    def __init__(
        self,
        out: Path,
        specs: Sequence[TensorSpec],
        *,
        shard_bytes: int = SHARD_BYTES,
        force: bool = False,
        extra_bytes: int = 0,
    ) -> None:
        self._shards = layout(specs, shard_bytes)
        self._index = index(self._shards, specs)
        self._folder = OutputFolder(out, force=force, need_bytes=size_on_disk(specs, shard_bytes) + extra_bytes)
        self.out, self.staging = self._folder.out, self._folder.staging
        self._specs = {spec.name: spec for spec in specs}
        self._place = {name: (self.staging / s.file, at) for s in self._shards for name, at in s.offsets.items()}
        self._finished = {name: _Ranges() for name in self._specs}
        self._mutex = threading.Lock()
        self._files = _Files()

    def __enter__(self) -> ModelWriter:
        with ExitStack() as stack:
            stack.enter_context(self._folder)
            for shard in self._shards:
                _allocate(self.staging / shard.file, shard.header, shard.size)
            stack.pop_all()  # all went well: the folder stays open until our own exit
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        self._folder.__exit__(kind, error, trace)

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Store elements `[start, start + len(values))` of a tensor. Thread-safe; ranges may come in any order.

        Args:
            name: a tensor of `specs`.
            start: first element, in row-major order.
            values: 1-D CPU tensor of exactly the dtype of the spec.

        Raises:
            ValueError: unknown name, other dtype, not flat, not on the CPU, outside the tensor.
            RuntimeError: the writer is not open.
            UserError: RG402 if the disk is full after all.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise ValueError(f"{name!r} is no tensor of this model")
        if values.dtype != spec.dtype or values.dim() != 1 or values.device.type != "cpu":
            got = f"{values.dtype} of {values.dim()} dimensions on {values.device}"
            raise ValueError(f"{name}: a flat {spec.dtype} tensor on the CPU is needed, not {got}")
        stop = start + values.numel()
        if start < 0 or stop > spec.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) lie outside its {spec.numel}")
        if not self._folder.active:
            raise RuntimeError("the writer is not open")
        path, offset = self._place[name]
        data = memoryview(values.detach().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = offset + start * spec.dtype.itemsize
        try:
            with self._files.descriptor(path) as descriptor:
                while data:
                    done = os.pwrite(descriptor, data, at)
                    data, at = data[done:], at + done
        except OSError as error:
            raise explained(error, self.out) from error
        self._record(name, start, stop)

    def publish(self) -> None:
        """Make the staging folder the output, by one rename, after everything in it has reached the disk.

        Raises:
            RuntimeError: elements that were never written, by tensor; or the writer is not open.
            UserError: RG401 if something else appeared in `out` meanwhile, RG402, RG405.
        """
        missing = self.missing()
        if missing:
            named = ", ".join(f"{name} ({count})" for name, count in list(missing.items())[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise RuntimeError(f"{len(missing)} tensors have elements that were never written: {named}{more}")
        self._files.close()
        if self._index is not None and self._folder.active:
            (self.staging / INDEX_NAME).write_text(self._index, encoding="utf-8")
        self._folder.publish()

    def missing(self) -> dict[str, int]:
        """Number of elements not written yet, for each tensor that has any."""
        with self._mutex:
            left = {name: spec.numel - self._finished[name].count for name, spec in self._specs.items()}
        return {name: count for name, count in left.items() if count}

    def _record(self, name: str, start: int, stop: int) -> None:
        """Note a finished range. A journal that makes a killed run resumable belongs here."""
        with self._mutex:
            self._finished[name].add(start, stop)


class _Ranges:
    """Element ranges of one tensor, merged where they touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        if start == stop:
            return
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last] = [start], [stop]

    @property
    def count(self) -> int:
        return sum(self._stops) - sum(self._starts)


class _Files:
    """A bounded number of open files, each used by any number of threads at once."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # path -> [descriptor, users]
        self._changed = threading.Condition()
        self._closed = False

    @contextmanager
    def descriptor(self, path: Path) -> Iterator[int]:
        with self._changed:
            if self._closed:
                raise RuntimeError("the writer is closed")
            entry = self._open.get(path)
            if entry is None:
                idle = next((p for p, (_, users) in self._open.items() if users == 0), None)
                if len(self._open) >= _OPEN_FILES and idle is not None:
                    os.close(self._open.pop(idle)[0])
                entry = self._open[path] = [os.open(path, os.O_WRONLY), 0]
            self._open.move_to_end(path)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._changed:
                entry[1] -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Refuse new users, wait for those there are, then close: no write can hit a reused descriptor."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: all(users == 0 for _, users in self._open.values()))
            while self._open:
                os.close(self._open.popitem()[1][0])


def _allocate(path: Path, header: bytes, size: int) -> None:
    """A file of `size` bytes that begins with `header`, its blocks reserved where the system can."""
    with path.open("xb") as file:
        file.write(header)
        file.flush()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NO_ALLOCATE:
                raise
        file.truncate(size)
