"""How a command ends, and what it says on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal, command
from regraft.errors import UserError, UserWarningMessage


def _invoke(work, *arguments: str) -> Any:
    """Run an app whose command `work` calls the function given."""
    app = typer.Typer()

    @app.callback()
    def _root(context: typer.Context, quiet: bool = False) -> None:
        context.obj = Terminal(quiet=quiet)

    def work_(terminal: Terminal, times: int = 1) -> None:
        """Do it."""
        for _ in range(times):
            work(terminal)

    app.command("work")(command(work_))
    return CliRunner().invoke(app, list(arguments) or ["work"])


def _raise(error: BaseException):
    def work(terminal: Terminal) -> None:
        raise error

    return work


def test_a_user_error_is_one_line_and_2() -> None:
    done = _invoke(_raise(UserError("RG303", "density is 7", where="recipe.yaml, line 3", fix="change density")))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "RG303: density is 7 (recipe.yaml, line 3): change density\n"


def test_ctrl_c_is_one_line_and_130() -> None:
    done = _invoke(_raise(KeyboardInterrupt()))
    assert (done.exit_code, done.stderr) == (130, "interrupted; nothing was written\n")


@pytest.mark.parametrize(("number", "sentence"), [(2, "interrupted"), (15, "terminated")])
def test_signals_are_one_line_and_128_more(number: int, sentence: str) -> None:
    before = [signal.getsignal(n) for n in (2, 15)]
    done = _invoke(lambda terminal: os.kill(os.getpid(), number))
    assert (done.exit_code, done.stderr) == (128 + number, f"{sentence}; nothing was written\n")
    assert [signal.getsignal(n) for n in (2, 15)] == before


def test_whoever_is_interrupted_may_say_what_is_left() -> None:
    done = _invoke(_raise(KeyboardInterrupt("3 of 9 tensors are kept")))
    assert (done.exit_code, done.stderr) == (130, "interrupted; 3 of 9 tensors are kept\n")


def _swallow(terminal: Terminal) -> None:
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def _break(terminal: Terminal) -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("cannot import name x") from None


def test_an_interruption_that_an_import_made_an_error_of_is_one_all_the_same() -> None:
    done = _invoke(_break)
    assert (done.exit_code, done.stderr) == (143, "terminated; nothing was written\n")


def test_an_interruption_that_was_swallowed_stops_the_next_step() -> None:
    def work(terminal: Terminal) -> None:
        with TerminalProgress(terminal) as progress:
            progress.step("one")
            _swallow(terminal)
            progress.step("two")
            terminal.line("two was begun")

    done = _invoke(work)
    assert (done.exit_code, done.stderr) == (143, "terminated; nothing was written\n")


def test_a_signal_that_is_to_be_ignored_is() -> None:
    """As in a job that nohup or a shell without job control has begun."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = _invoke(lambda terminal: (os.kill(os.getpid(), signal.SIGINT), terminal.line("done")))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.exit_code, done.stderr) == (0, "done\n")


WAITS = """
import sys, threading, time
from regraft.cli import main, terminal

def work(terminal):
    "Waits, and leaves a thread that has not ended."
    threading.Thread(target=time.sleep, args=[SECONDS]).start()
    print("ready", flush=True)
    time.sleep(60)

main.app.command()(terminal.command(work))
sys.argv[1:] = ["work"]
main.main()
"""


@contextmanager
def waiting(seconds: int) -> Iterator[subprocess.Popen[str]]:
    """A regraft that waits, with a thread that goes on for so many seconds after it."""
    command = [sys.executable, "-c", WAITS.replace("SECONDS", str(seconds))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_the_status_of_a_process_that_was_terminated() -> None:
    with waiting(0) as process:
        process.terminate()
        assert process.communicate(timeout=30) == ("", "terminated; nothing was written\n")
        assert process.returncode == 143


def test_a_second_ctrl_c_ends_what_does_not_end_by_itself_without_a_traceback() -> None:
    with waiting(60) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "interrupted; nothing was written\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == -signal.SIGINT


def test_what_nobody_foresaw_is_one_line_and_1() -> None:
    done = _invoke(_raise(ValueError("a\nb")))
    assert done.exit_code == 1
    assert done.stderr == "error: ValueError: a b; run again with --debug for the traceback\n"


@pytest.mark.parametrize("error", [ValueError("a"), UserError("RG303", "b")])
def test_debug_shows_the_traceback(error: Exception) -> None:
    done = _invoke(_raise(error), "work", "--debug")
    assert "Traceback (most recent call last)" in done.stderr
    assert "in _raise" not in done.stderr  # from where it was raised, not from where it was made
    assert "in work" in done.stderr


def test_an_exit_of_the_command_is_its_own() -> None:
    assert _invoke(_raise(typer.Exit(7))).exit_code == 7
    usage = _invoke(_raise(typer.BadParameter("no")))
    assert usage.exit_code == 2
    assert "no" in usage.stderr


def test_a_reader_that_went_away_is_no_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "dup2", lambda *a: calls.append(a))
    monkeypatch.setattr(sys.stdout.__class__, "fileno", lambda self: 1, raising=False)
    done = _invoke(_raise(BrokenPipeError()))
    assert (done.exit_code, done.stderr) == (1, "")


def _talk(terminal: Terminal) -> None:
    terminal.line("a [bold]line[/]")
    terminal.note("once")
    warnings.warn("for the user", UserWarningMessage, stacklevel=1)
    warnings.warn("for programmers", UserWarning, stacklevel=1)
    terminal.json({"é": 1})


def test_notes_are_said_once_and_results_go_to_stdout() -> None:
    done = _invoke(_talk, "work", "--times", "2")
    assert done.stdout == '{\n  "é": 1\n}\n' * 2
    assert done.stderr.splitlines() == ["a [bold]line[/]", "note: once", "note: for the user", "a [bold]line[/]"]


@pytest.mark.parametrize("arguments", [["work", "-q"], ["work", "--quiet"], ["--quiet", "work"]])
def test_quiet_leaves_the_result(arguments: list[str]) -> None:
    done = _invoke(_talk, *arguments)
    assert (done.stdout, done.stderr) == ('{\n  "é": 1\n}\n', "")


def test_verbose_shows_other_warnings() -> None:
    assert "for programmers" in _invoke(_talk, "work", "-v").stderr


def test_names_in_files_of_others_cannot_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b]0;owned\x07\u202eb\udc80 é"
    safe = r"a\x1b]0;owned\x07\u202eb\udc80 é"
    assert str(UserError("RG202", f"there is no tensor {name}")) == f"there is no tensor {safe}"
    Terminal().note(f"first\n{name}")
    assert capsys.readouterr().err == f"note: first\n{safe}\n"
