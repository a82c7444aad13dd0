"""Open files, as few as a big model allows: opened when first read, kept while used, closed when the pool is full.

`os.preadv` at absolute offsets needs no lock and no seek, so any number of threads share one descriptor. Memory maps
would save a copy, but touching a page of a file that has become shorter kills the process (SIGBUS); here it is a short
read, which is an error with a sentence. Every read checks that the file is still the one that was opened.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from regraft.checkpoint.paths import regular_size
from regraft.errors import UserError

OPEN_FILES = 64
_ONE_CALL = 1 << 30  # Linux moves at most 2 GiB - 4 KiB at once, macOS refuses more than 2 GiB - 1


class _Pool:
    """Least recently used descriptors are closed first; those in use never."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # key -> descriptor
        self._users: dict[int, int] = {}
        self._dropped: deque[int] = deque()

    def acquire(self, key: int, path: Path) -> int:
        """The descriptor of a file, opened if need be, which stays open until it is released."""
        with self._lock:
            self._close_dropped()
            if key not in self._open:
                surplus = len(self._open) + 1 - self.limit
                for old in [k for k in self._open if k not in self._users][: max(surplus, 0)]:
                    os.close(self._open.pop(old))
                self._open[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            return self._open[key]

    def release(self, key: int) -> None:
        """Give back what `acquire` gave."""
        with self._lock:
            left = self._users.get(key, 0) - 1
            if left > 0:
                self._users[key] = left
            else:
                self._users.pop(key, None)

    @contextmanager
    def using(self, key: int, path: Path) -> Iterator[int]:
        """The descriptor of a file, which stays open within the context."""
        descriptor = self.acquire(key, path)
        try:
            yield descriptor
        finally:
            self.release(key)

    def drop(self, key: int) -> None:
        """Close a file that nobody can use any more, at once or at the next use of the pool.

        Called by the garbage collector, which may interrupt this very thread while it holds the lock.
        """
        self._dropped.append(key)
        if self._lock.acquire(blocking=False):
            try:
                self._close_dropped()
            finally:
                self._lock.release()

    def _close_dropped(self) -> None:
        while self._dropped:
            descriptor = self._open.pop(self._dropped.popleft(), None)
            if descriptor is not None:
                os.close(descriptor)

    def __len__(self) -> int:
        return len(self._open)


POOL = _Pool(OPEN_FILES)
_KEYS = itertools.count()


class DataFile:
    """A file of known size and time of change, read at absolute offsets by any number of threads.

    Raises:
        UserError: RG101 if `path` is missing or no regular file.
    """

    def __init__(self, path: Path) -> None:
        regular_size(path)
        self.path = path
        self._key = next(_KEYS)
        weakref.finalize(self, POOL.drop, self._key).atexit = False
        try:
            with POOL.using(self._key, path) as descriptor:
                self._state = _state(descriptor)
        except OSError as error:
            what, fix = f"the file cannot be read: {error.strerror}", "check its permissions"
            raise UserError("RG101", what, where=str(path), fix=fix) from None

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._state[2]

    def read(self, offset: int, nbytes: int, what: Callable[[], str]) -> Any:
        """Bytes `[offset, offset + nbytes)` as a fresh uint8 array of shape (nbytes,), aligned for every dtype.

        Args:
            offset, nbytes: within the file as it was when it was opened.
            what: gives the name of what is read, for a message.

        Raises:
            UserError: RG101 if the file is gone; RG103 if it ends early or has changed since it was opened.
        """
        buffer = np.empty(nbytes, np.uint8)
        self.read_into(buffer, offset, what)
        return buffer

    def read_into(self, buffer: Any, offset: int, what: Callable[[], str]) -> None:
        """Fill a contiguous uint8 array with the bytes from `offset` on; raises as `read` does."""
        view = memoryview(buffer)
        nbytes, done = len(view), 0
        try:
            descriptor = POOL.acquire(self._key, self.path)
            try:
                while done < nbytes:
                    got = os.preadv(descriptor, [view[done : done + _ONE_CALL]], offset + done)
                    if not got:
                        raise self._changed(f"the file ends within {what()}")
                    done += got
                if _state(descriptor) != self._state:
                    raise self._changed(f"the file was changed while regraft was reading it, at {what()}")
            finally:
                POOL.release(self._key)
        except FileNotFoundError as error:  # the cause is kept: it tells failures of the system from bad input
            raise UserError(
                "RG101", "the file is gone", where=str(self.path), fix="run again with it in place"
            ) from error
        except OSError as error:
            reason = f"{what()} cannot be read: {error.strerror}"
            raise UserError(
                "RG103", reason, where=str(self.path), fix="check the disk, or copy the file again"
            ) from error

    def _changed(self, what: str) -> UserError:
        return UserError("RG103", what, where=str(self.path), fix="run again when nothing else writes to it")


def _state(descriptor: int) -> tuple[int, int, int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
