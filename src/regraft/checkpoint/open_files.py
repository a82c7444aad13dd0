"""Files that many threads write at once, those that are large past the system's page cache.

A merged model is written once and synced at once. Through the cache that costs a copy and a fresh page for every
4 KiB, pushes the models that are being read out of memory, and leaves all of it to the sync; past the cache the disk
takes whole blocks while the processor computes. Linux asks for offsets, lengths and addresses at multiples of a block
then, so data go through one aligned buffer per thread, and the parts of blocks at either end of a slice are written as
usual: no block is ever written both ways. File systems that refuse are written to as usual.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ALIGNMENT = 4096  # covers the blocks of all common disks
WORTHWHILE = 512 << 20  # bytes of a file; a smaller one may as well stay in memory for whoever loads it next
_BUFFER = 4 << 20
MOST_OPEN = 64
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}


class OpenFiles:
    """A bounded number of open files, each written by any number of threads at once, to distinct ranges.

    Args:
        sizes: the files and their sizes; they exist at that size before they are written.
        past_cache: whether large files are written past the cache.
    """

    def __init__(self, sizes: Mapping[Path, int], *, past_cache: bool = True) -> None:
        self._sizes = sizes
        self._open: OrderedDict[tuple[Path, bool], list[int]] = OrderedDict()  # -> [descriptor, users]
        self._changed = threading.Condition()
        self._closed = False
        self._memory = threading.local()
        self._refused = not (past_cache and hasattr(os, "O_DIRECT"))

    def write(self, path: Path, data: memoryview, at: int) -> None:
        """Write all of `data` at the offset `at`.

        Raises:
            OSError: the disk is full, or fails.
            RuntimeError: `close` was called.
        """
        first, last = at + len(data), at + len(data)
        if not self._refused and self._sizes[path] >= WORTHWHILE:
            first = min(-(-at // ALIGNMENT) * ALIGNMENT, first)
            last = max(last // ALIGNMENT * ALIGNMENT, first)
        for begin, end in ((at, first), (last, at + len(data))):
            if begin < end:
                with self._descriptor(path) as descriptor:
                    _write_all(descriptor, data[begin - at : end - at], begin)
        for begin in range(first, last, _BUFFER):
            end = min(begin + _BUFFER, last)
            self._write_blocks(path, data[begin - at : end - at], begin)

    def _write_blocks(self, path: Path, data: memoryview, at: int) -> None:
        """Write whole blocks, past the cache unless the file system refuses."""
        if not self._refused:
            aligned = self._buffer()[: len(data)]
            aligned[:] = data
            try:
                with self._descriptor(path, direct=True) as descriptor:
                    _write_all(descriptor, aligned, at, step=ALIGNMENT)
                return
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._refused = True
        with self._descriptor(path) as descriptor:
            _write_all(descriptor, data, at)

    def _buffer(self) -> memoryview:
        """This thread's memory at the beginning of a page."""
        if not hasattr(self._memory, "buffer"):
            self._memory.buffer = memoryview(mmap.mmap(-1, _BUFFER))
        buffer: memoryview = self._memory.buffer
        return buffer

    @contextmanager
    def _descriptor(self, path: Path, *, direct: bool = False) -> Iterator[int]:
        key = (path, direct)
        with self._changed:
            if self._closed:
                raise RuntimeError("the writer is closed")
            entry = self._open.get(key)
            if entry is None:
                idle = next((k for k, (_, users) in self._open.items() if users == 0), None)
                if len(self._open) >= MOST_OPEN and idle is not None:
                    os.close(self._open.pop(idle)[0])
                flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if direct else 0)
                entry = self._open[key] = [os.open(path, flags), 0]
            self._open.move_to_end(key)
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


def _write_all(descriptor: int, data: memoryview, at: int, *, step: int = 1) -> None:
    """Write all of `data`; what one call leaves over is written by the next, from a multiple of `step`."""
    while data:
        done = os.pwrite(descriptor, data, at) // step * step
        if not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # how a full disk ends a write that began
        data, at = data[done:], at + done
