"""What a run tells while it works. The command line draws it; the library is silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a run, from the thread that works."""

    def step(self, name: str) -> None:
        """A step begins."""
        ...

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` elements have passed through the current step; `total` may grow when a rule looks again."""
        ...

    def figures(self, figures: Mapping[str, float]) -> None:
        """What a training step measured: loss, its parts, learning_rate, seconds_left."""
        ...

    def message(self, text: str) -> None:
        """One line: a step was taken from the cache, a remark, a result."""
        ...


class Silent:
    """No output at all."""

    def step(self, name: str) -> None: ...
    def advance(self, done: int, total: int) -> None: ...
    def figures(self, figures: Mapping[str, float]) -> None: ...
    def message(self, text: str) -> None: ...
