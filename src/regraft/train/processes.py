"""Several processes that do one run, as `accelerate launch` or torchrun start them: who writes, and where they meet.

One process alone is a team of one, for which meeting costs nothing. A team may wait for days at a meeting, since one of
its processes may be doing a long merge or evaluation while the others have nothing to do.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

_PATIENCE = datetime.timedelta(days=30)


def count() -> int:
    """How many processes this run has, by what launched it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them.

    Attributes:
        size: how many they are.
        rank: which one this is; the first one writes.
        cpu: whether they compute on the processor.
    """

    size: int = 1
    rank: int = 0
    cpu: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            self._state().wait_for_everyone()

    def agreed(self, answer: bool) -> bool:
        """The first one's answer, for all."""
        return bool(self._shared(answer)[0])

    def any(self, answer: bool) -> bool:
        """Whether any of them says so."""
        return any(self._shared(answer))

    def _shared(self, answer: bool) -> list[bool]:
        if self.size == 1:
            return [answer]
        import torch

        self._state()
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, answer)
        return found

    def _state(self) -> Any:
        from accelerate import PartialState

        return PartialState(cpu=self.cpu or not accelerated(), timeout=_PATIENCE)


def accelerated() -> bool:
    """Whether torch has anything faster than the processor here."""
    import torch

    known = getattr(torch, "accelerator", None)
    return bool(known.is_available()) if known is not None else torch.cuda.is_available()


def team(device: str = "auto") -> Team:
    """The team of this process."""
    return Team(count(), rank(), device == "cpu")
