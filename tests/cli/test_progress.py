"""Progress: a bar on a terminal, lines in a log, nothing with --quiet."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal


def _terminal(quiet: bool = False, bar: bool = False) -> tuple[Terminal, io.StringIO]:
    terminal, stream = Terminal(quiet=quiet), io.StringIO()
    terminal.__dict__["err"] = Console(file=stream, force_terminal=bar, width=100, highlight=False)
    return terminal, stream


def _work(terminal: Terminal) -> None:
    with TerminalProgress(terminal) as progress:
        progress.step("merged")
        progress.advance(1, 4)
        progress.advance(4, 4)
        progress.message("note: look here")
        progress.message("note: look here")
        progress.step("score")
        progress.message("score: done before")


def test_a_log_has_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(t) for t in range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    terminal, stream = _terminal()
    _work(terminal)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("merged: 25%, ")
    assert lines[0].endswith(" left")
    assert lines[1] == "note: look here"
    assert lines[2].startswith("merged: done in ")
    assert lines[3:] == ["score: done before"]


def test_quiet_is_silent() -> None:
    terminal, stream = _terminal(quiet=True, bar=True)
    _work(terminal)
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar_which_goes_away() -> None:
    terminal, stream = _terminal(bar=True)
    _work(terminal)
    assert "merged" in stream.getvalue()
    assert "\x1b[2K" in stream.getvalue()  # lines are erased
    assert "\x1b[?25h" in stream.getvalue()  # the cursor is shown again


def test_an_error_stops_the_bar_and_claims_nothing() -> None:
    terminal, stream = _terminal(bar=True)

    def fail() -> None:
        with TerminalProgress(terminal) as progress:
            progress.step("merged")
            progress.advance(1, 4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "done in" not in stream.getvalue()
    assert "\x1b[?25h" in stream.getvalue()
