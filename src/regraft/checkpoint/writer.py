"""Writing a model's weights: slices at their final offsets, in any order, from any number of threads.

Headers are written and disk space is reserved before the first slice (see `shards`), the whole appears under its
final name by one rename (see `output`), and only if every element was written. A slice goes from the caller's tensor to
its place in the file, past the page cache if the file is large (see `open_files`), so writing costs next to no memory.

A writer that is told what the values depend on keeps a journal of finished tensors (see `journal`). The same run then
goes on after a kill, and after whatever is not the fault of its input: Ctrl-C, a read that failed, a source that was
away. A run whose input is bad, and one that filled the disk, leaves nothing: its staging folder would be of no use, or
in the way of everything else on that disk.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from stat import S_ISREG
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.dtypes import array_dtype, as_array, dtype_name, item_size
from regraft.checkpoint.flush import Flusher
from regraft.checkpoint.interrupted import kept, may_pass
from regraft.checkpoint.journal import FILE_NAME as JOURNAL
from regraft.checkpoint.journal import Journal, boot_id
from regraft.checkpoint.open_files import OpenFiles
from regraft.checkpoint.output import OutputFolder, explained, remove
from regraft.checkpoint.shards import (
    INDEX_NAME,
    SHARD_BYTES,
    Shard,
    TensorSpec,
    index,
    layout,
    layout_digest,
    size_on_disk,
)

if TYPE_CHECKING:
    import torch

__all__ = ["ModelWriter", "TensorSpec", "size_on_disk"]

_NO_ALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class ModelWriter:
    """Writes the weights of one model into `out`; other files of the model are put into `staging` by the caller.

    The constructor checks and creates nothing; entering the context makes the staging folder with all shards at
    their full size, or goes on with that of an unfinished run. Leaving it without `publish` removes all of it again,
    unless tensors are finished and `depends_on` is given and the exception is one that the next run may not meet:
    then its sentence says that the same command goes on, and where the folder is.

    Args:
        out: the folder to make; it may exist if it is empty, or hold a model if `force`.
        specs: the tensors, in the order in which they are best stored; tied copies are left out by the caller.
        shard_bytes: most bytes of tensor data per file; a larger tensor has a file to itself.
        force: replace a model that is in `out` already.
        sync: publish what has reached the disk; else what the system has taken.
        extra_bytes: room that the caller needs in the staging folder besides the weights.
        depends_on: everything that the values depend on, JSON-able; a run with equal facts and tensors may go on
            where this one stopped. Nothing is resumed if None.

    Attributes:
        finished: the tensors that an earlier run has finished, with the facts that `finish` was given for them; known
            once the writer is open. They count as written.

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
        sync: bool = True,
        extra_bytes: int = 0,
        depends_on: Mapping[str, Any] | None = None,
    ) -> None:
        self._shards = layout(specs, shard_bytes)
        self._index = index(self._shards, specs)
        need = size_on_disk(specs, shard_bytes) + extra_bytes
        self._folder = OutputFolder(out, force=force, sync=sync, need_bytes=need, adopt=self._adopt)
        self.out, self.staging = self._folder.out, self._folder.staging
        self._specs = {spec.name: spec for spec in specs}
        self._place = {name: (self.staging / s.file, at) for s in self._shards for name, at in s.offsets.items()}
        self._written = {name: _Ranges() for name in self._specs}
        self._mutex = threading.Lock()
        self._files = OpenFiles({self.staging / s.file: s.size for s in self._shards}, past_cache=sync)
        self._flusher = Flusher() if sync else None
        self._depends_on = depends_on
        self._journal: Journal | None = None
        self._damaged = False  # the disk refused something that was to be kept
        self.finished: Mapping[str, dict[str, Any]] = {}

    def __enter__(self) -> ModelWriter:
        with ExitStack() as stack:
            stack.enter_context(self._folder)
            if self._journal is None:
                for shard in self._shards:
                    _allocate(self.staging / shard.file, shard.header, shard.size)
                if self._depends_on is not None and boot_id():
                    self._journal = Journal.create(self.staging / JOURNAL, self._identity(self._depends_on))
            stack.pop_all()  # all went well: the folder stays open until our own exit
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
        try:
            self._end_flushing()
        except OSError:
            self._damaged = True  # if all else went well, the sync before publishing has told it already
        count = 0
        if self._journal is not None:
            self._journal.close()
            count = self._journal.count
        # The journal goes before the output gets its name: interrupted after that, there is nothing to go on with.
        of_use = count and not self._damaged and self._folder.active and (self.staging / JOURNAL).exists()
        if error is None or not of_use or not may_pass(error):
            self._folder.__exit__(kind, error, trace)
            return
        self._folder.abort(keep=True)
        raise kept(error, f"{count} of {len(self._specs)} tensors", self.staging) from error

    def _identity(self, depends_on: Mapping[str, Any]) -> dict[str, Any]:
        """What a journal must say to be believed; made from the shards as they lie in the staging folder.

        Raises:
            OSError: a shard is missing.
        """
        states = [(self.staging / shard.file).lstat() for shard in self._shards]
        files = [[state.st_dev, state.st_ino] for state in states]
        return {"depends_on": depends_on, "layout": layout_digest(self._shards), "shards": files}

    def _adopt(self, staging: Path) -> bool:
        """Go on with what an unfinished run has left, if it is of this very run and as it was left."""
        if self._depends_on is None or not boot_id():
            return False
        try:
            if not all(_as_laid_out(staging / shard.file, shard) for shard in self._shards):
                return False
            identity = self._identity(self._depends_on)
            journal = Journal.adopt(staging / JOURNAL, identity, self._specs)
            if journal is None:
                return False
            ours = {JOURNAL, *(shard.file for shard in self._shards)}
            for path in [path for path in staging.iterdir() if path.name not in ours]:
                remove(path)
        except OSError:
            return False  # it cannot be read as a whole: the folder makes a new one, or says why it cannot
        for name in journal.finished:
            self._written[name].add(0, self._specs[name].numel)
        self._journal, self.finished = journal, journal.finished
        return True

    def write(self, name: str, start: int, values: torch.Tensor | np.ndarray) -> None:
        """Store elements `[start, start + len(values))` of a tensor. Thread-safe; ranges may come in any order.

        Args:
            name: a tensor of `specs`.
            start: first element, in row-major order.
            values: 1-D CPU tensor of exactly the dtype of the spec, or an array of its `array_dtype`.

        Raises:
            ValueError: unknown name, other dtype, not flat, not on the CPU, outside the tensor.
            RuntimeError: the writer is not open.
            UserError: RG402 if the disk is full after all.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise ValueError(f"{name!r} is no tensor of this model")
        array = _flat(values, spec)
        stop = start + len(array)
        if start < 0 or stop > spec.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) lie outside its {spec.numel}")
        if not self._folder.active:
            raise RuntimeError("the writer is not open")
        path, offset = self._place[name]
        data = array.view(np.uint8).data
        at = offset + start * item_size(spec.dtype)
        try:
            self._files.write(path, data, at)
        except OSError as error:
            raise self._failed(error) from error
        with self._mutex:
            self._written[name].add(start, stop)

    def finish(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note that all elements of a tensor are written, for a run that goes on after this one. Thread-safe.

        Args:
            name: a tensor of `specs`, all of which has been written.
            facts: JSON-able; a later run finds them in `finished`.

        Raises:
            RuntimeError: elements of it were never written, or the writer is not open.
            UserError: RG402 or RG405 if the disk failed.
        """
        with self._mutex:
            left = self._specs[name].numel - self._written[name].count
        if left:
            raise RuntimeError(f"{name} is not finished: {left} elements were never written")
        if not self._folder.active:
            raise RuntimeError("the writer is not open")
        try:
            if self._journal is not None:
                self._journal.add(name, facts)
            if self._flusher is not None:
                self._flusher.wrote(self._place[name][0], self._specs[name].nbytes)
        except OSError as error:
            raise self._failed(error) from error

    def publish(self) -> None:
        """Make the staging folder the output, by one rename; with `sync` after everything in it has reached the disk.

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
        try:
            self._end_flushing()
            if self._index is not None and self._folder.active:
                (self.staging / INDEX_NAME).write_text(self._index, encoding="utf-8")
        except OSError as error:
            raise self._failed(error) from error
        self._folder.publish(without=JOURNAL if self._journal is not None else "")

    def missing(self) -> dict[str, int]:
        """Number of elements not written yet, for each tensor that has any."""
        with self._mutex:
            left = {name: spec.numel - self._written[name].count for name, spec in self._specs.items()}
        return {name: count for name, count in left.items() if count}

    def _end_flushing(self) -> None:
        if self._flusher is not None:
            self._flusher.close()

    def _failed(self, error: OSError) -> Exception:
        """The sentence for a write or a sync that failed, after which nothing on that disk is relied on."""
        self._damaged = True
        return explained(error, self.out)


def _flat(values: torch.Tensor | np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The values as an array of the spec's `array_dtype`; ValueError for what cannot be written as it is."""
    if isinstance(values, np.ndarray):
        if values.dtype == array_dtype(spec.dtype) and values.ndim == 1:
            return np.ascontiguousarray(values)
        got = f"an array of {values.dtype} of {values.ndim} dimensions"
    else:
        if values.device.type == "cpu" and values.dim() == 1 and dtype_name(values.dtype) == spec.dtype:
            return as_array(values)
        got = f"{values.dtype} of {values.dim()} dimensions on {values.device}"
    raise ValueError(f"{spec.name}: flat values of {spec.dtype} on the CPU are needed, not {got}")


def _as_laid_out(path: Path, shard: Shard) -> bool:
    """Whether a file has the size and the header of a shard."""
    status = path.lstat()
    if not S_ISREG(status.st_mode) or status.st_size != shard.size:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header


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
