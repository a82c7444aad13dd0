"""Data on their way to the disk while the next are computed, so that the sync before publishing finds little to do.

A thread of its own syncs the files to which enough has been written; a write never waits for it. It is a help and no
guarantee: everything is synced once more before an output gets its name. What it finds out about the disk is kept and
raised by the next call, since a system tells of a failed write only once.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from pathlib import Path

EVERY = 64 << 20  # bytes per sync; smaller ones would cost more in the file system's own journal than they save
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Flusher:
    """Syncs files in the background; `close` ends it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._written: Counter[Path] = Counter()
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def wrote(self, path: Path, nbytes: int) -> None:
        """Tell of bytes that a file has been given. Thread-safe; never waits for the disk.

        Raises:
            OSError: an earlier sync failed.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            self._written[path] += nbytes
            if self._closed or self._written[path] < EVERY:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """End after the sync that is going on.

        Raises:
            OSError: a sync failed.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (path := self._next()) is not None:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    # Not on macOS. Sizes do not change, so the rest of what fsync would write can wait.
                    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    self._error = error
                return

    def _next(self) -> Path | None:
        with self._changed:
            while not self._closed:
                for path, nbytes in self._written.items():
                    if nbytes >= EVERY:
                        del self._written[path]
                        return path
                self._changed.wait()
            return None
