"""What extracting and applying share: a check of the output before anything is read, and tensors in some threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from regraft.checkpoint import Checkpoint
from regraft.checkpoint.output import OutputFolder
from regraft.errors import UserError

A = TypeVar("A")
B = TypeVar("B")


def check_output(out: Path, sources: Iterable[Checkpoint], *, force: bool) -> None:
    """Refuse an output that cannot be made, or that would replace what it is made from.

    Raises:
        UserError: RG401, RG405.
    """
    resolved = out.resolve()
    for source in (path.resolve() for one in sources for path in (one.path, *one.folders)):
        if resolved == source or resolved in source.parents:
            what = f"the output is the folder of {source.name}, or one above it"
            raise UserError("RG401", what, where=str(out), fix="name another output")
    OutputFolder(out, force=force)


class Work:
    """Elements done of `total`, told to `on_progress`."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._total, self._on_progress, self._done = total, on_progress, 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """So many elements more are done. Thread-safe."""
        with self._lock:
            self._done += count
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)


def each(function: Callable[[A], B], items: Iterable[A]) -> list[B]:
    """A function of every item, in some threads."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
