"""Progress of a run: a bar on a terminal, plain lines in a log, nothing with --quiet."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regraft.cli.terminal import Terminal
from regraft.inspect.words import count as count
from regraft.inspect.words import duration as duration

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 15.0


class TerminalProgress:
    """Draws what `regraft.recipe.progress.Progress` is told; a context manager, which puts the terminal in order."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._bar: Progress | None = None
        self._task: Any = None
        self._name = ""
        self._begun = self._said = time.monotonic()
        self._done = 0
        self._figures = ""

    def __enter__(self) -> TerminalProgress:
        if not self._terminal.quiet and self._terminal.err.is_terminal:
            self._bar = _bar(self._terminal)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        if self._bar is not None:
            self._bar.stop()

    def step(self, name: str) -> None:
        """A step begins; the one before it is done.

        Raises:
            KeyboardInterrupt: the run is to stop, which an import or another package's code has swallowed until here.
        """
        if self._terminal.arrived:
            raise KeyboardInterrupt
        self._finish()
        self._name, self._done, self._figures = name, 0, ""
        self._begun = self._said = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=None)

    def figures(self, figures: Mapping[str, float]) -> None:
        """The loss of a training step, beside the name of the step; whole logs are in the artefact."""
        shown = {name: figures[name] for name in ("loss", "learning_rate") if name in figures}
        self._figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in shown.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._name} {self._figures}".strip())

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` elements of the step."""
        self._done = done
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            self._said = now
            rate = done / max(now - self._begun, 1e-9)
            left = duration((total - done) / rate)
            speed = self._figures or f"{count(rate)} elements/s"
            self._terminal.line(f"{self._name}: {done / total:.0%}, {speed}, {left} left")

    def message(self, text: str) -> None:
        """One line above the bar."""
        if text.startswith("note: "):
            self._terminal.note(text.removeprefix("note: "))
        else:
            self._terminal.line(text)

    def _finish(self) -> None:
        if self._task is not None and self._bar is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if self._name and self._done:
            self._terminal.line(f"{self._name}: done in {duration(time.monotonic() - self._begun)}")
        self._name = ""


def _bar(terminal: Terminal) -> Progress:
    from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Elements per second."""

        def render(self, task: Any) -> Text:
            return Text(f"{count(task.speed)}/s" if task.speed else "", style="progress.data.speed")

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), Rate())
    return Progress(*columns, TimeRemainingColumn(), console=terminal.err, transient=True)
