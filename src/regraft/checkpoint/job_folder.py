"""An output made in parts that are noted: what a run that died had done is there for the same run after it.

`ModelWriter` is for weights whose layout is known at the start, and keeps each tensor where it will lie. This folder is
for work before that, such as surveys and decompositions: a part is a few facts in the journal, and files in the staging
folder if the caller writes some (whole, before the part is noted). The journal is believed as that of `ModelWriter` is;
see `journal`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from regraft.checkpoint.interrupted import kept, may_pass
from regraft.checkpoint.journal import FILE_NAME as JOURNAL
from regraft.checkpoint.journal import Journal, boot_id
from regraft.checkpoint.output import OutputFolder, explained
from regraft.errors import UserWarningMessage


class JobFolder:
    """The folder `out`, filled through `staging`.

    Leaving the context without `publish` removes everything, unless parts are finished and the exception is one that
    the next run may not meet: then its sentence says that the same command goes on.

    Args:
        out: the folder to make; it may exist if it is empty, or hold a model if `force`.
        parts: the names of all parts.
        depends_on: everything that the parts depend on, JSON-able.
        force: replace a model that is in `out` already.
        need_bytes: room that the staging folder will need.

    Attributes:
        done: the facts of finished parts, those of an earlier run included.

    Raises:
        UserError: RG401, RG402, RG405 (see `OutputFolder`).
    """

    def __init__(
        self,
        out: Path,
        parts: Collection[str],
        depends_on: Mapping[str, Any],
        *,
        force: bool = False,
        need_bytes: int = 0,
    ) -> None:
        self._folder = OutputFolder(out, force=force, need_bytes=need_bytes, adopt=self._adopt)
        self.out, self.staging = self._folder.out, self._folder.staging
        self._parts, self._depends_on = frozenset(parts), depends_on
        self._journal: Journal | None = None
        self.done: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> JobFolder:
        with ExitStack() as stack:
            stack.enter_context(self._folder)
            if self._journal is None and boot_id():
                self._journal = Journal.create(self.staging / JOURNAL, self._identity(self.staging))
            stack.pop_all()  # all went well: the folder stays open until our own exit
        if self.done:
            told = f"{len(self.done)} of {len(self._parts)} parts of the work are there from a run that did not end"
            warnings.warn(told, UserWarningMessage, stacklevel=2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.close()
        of_use = self._journal is not None and self.done and self._folder.active
        if error is None or not of_use or not may_pass(error):
            self._folder.__exit__(kind, error, trace)
            return
        self._folder.abort(keep=True)
        told = kept(error, f"{len(self.done)} of {len(self._parts)} parts of the work", self.staging)
        if told is not error:
            raise told from error

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The facts of a part: what `work` gives now, or gave in a run before this one. Thread-safe.

        Args:
            name: one of `parts`.
            work: gives JSON-able facts; all files that belong to the part are written when it returns.

        Raises:
            UserError: RG402 or RG405 if the facts cannot be written.
        """
        if name not in self.done:
            if name not in self._parts:
                raise ValueError(f"{name!r} is no part of this work")
            facts = work()
            try:
                if self._journal is not None:
                    self._journal.add(name, facts)
            except OSError as error:
                raise explained(error, self.out) from error
            self.done[name] = facts
        return self.done[name]

    def publish(self) -> None:
        """See `OutputFolder.publish`."""
        self._folder.publish(without=JOURNAL if self._journal is not None else "")

    def _identity(self, staging: Path) -> dict[str, Any]:
        state = staging.lstat()
        return {"depends_on": self._depends_on, "staging": [state.st_dev, state.st_ino]}

    def _adopt(self, staging: Path) -> bool:
        if not boot_id():
            return False
        try:
            self._journal = Journal.adopt(staging / JOURNAL, self._identity(staging), self._parts)
        except OSError:
            return False  # it cannot be read as a whole: the folder makes a new one, or says why it cannot
        if self._journal is not None:
            self.done = dict(self._journal.finished)
        return self._journal is not None
