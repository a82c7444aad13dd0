"""What every command shares: the two output streams, how much to say, and how a command ends.

Results go to stdout, everything else (progress, notes, errors) to stderr, so that `--json` can be piped. The exit
status is 0 if it is done, 2 if the user's input is wrong, 130 after Ctrl-C, 143 after SIGTERM, 1 for anything else.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from regraft.cli.signals import WORDS, stopping
from regraft.errors import UserError, UserWarningMessage, printable

if TYPE_CHECKING:
    from rich.console import Console

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more: the plan, and other packages' warnings.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_FLAGS: dict[str, Any] = {"verbose": Verbose, "quiet": Quiet, "debug": Debug}

_WIDE = 400
UNFORESEEN = "run again with --debug for the traceback"


@dataclass
class Terminal:
    """Where a command writes, and how much.

    `interrupted` is what Ctrl-C leaves behind, in words; `arrived` are the signals to stop that have come; `notes` are
    regraft's own remarks so far, shown or not.
    """

    verbose: bool = False
    quiet: bool = False
    debug: bool = False
    interrupted: str = "nothing was written"
    arrived: list[signal.Signals] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _foreign: set[str] = field(default_factory=set)

    @cached_property
    def out(self) -> Console:
        """Results."""
        from rich.console import Console

        # In a file or pipe, tables are as wide as they need to be rather than 80 columns.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
        return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=width)

    @cached_property
    def err(self) -> Console:
        """Everything that is no result."""
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True)

    def json(self, data: Any) -> None:
        """Print a result for a script."""
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=not unicode) + "\n")

    def line(self, text: str) -> None:
        """A remark, unless --quiet."""
        if not self.quiet:
            self.err.print(printable(text), markup=False)

    def note(self, text: str) -> None:
        """A remark of regraft's, once, unless --quiet."""
        if text not in self.notes:
            self.notes.append(text)
            self.line(f"note: {text}")

    def repeat(self, notes: Iterable[str]) -> None:
        """The remarks of an earlier run."""
        for text in notes:
            self.note(text)

    def foreign(self, text: str) -> None:
        """Another package's warning, once, unless --quiet."""
        if text not in self._foreign:
            self._foreign.add(text)
            self.line(f"note: {text}")

    def unless_stamped(self, reason: str) -> None:
        """With --verbose, why the same command will check everything again next time; nothing if `reason` is ""."""
        if self.verbose and reason:
            self.line(f"no stamp for a quick second run: {reason}")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first parameter is a `Terminal`; the others are its arguments and options.

    Adds --verbose, --quiet and --debug, which may stand before or behind the command's name, and turns exceptions into
    one line and an exit status.
    """
    # Not typing.get_type_hints: in Python 3.10 it hides the options of parameters whose default is None.
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *own]
    for name, annotation in _FLAGS.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation))

    def run(context: typer.Context, verbose: bool, quiet: bool, debug: bool, **arguments: Any) -> None:
        before = context.find_root().obj or Terminal()
        terminal = replace(
            before, verbose=before.verbose or verbose, quiet=before.quiet or quiet, debug=before.debug or debug
        )
        _run(terminal, lambda: function(terminal, **arguments))

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _run(terminal: Terminal, work: Callable[[], None]) -> None:
    _calm_others(terminal)
    try:
        with stopping(terminal.arrived), warnings.catch_warnings():
            _show_warnings(terminal)
            work()
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt as error:
        _stopped(terminal, str(error))
    except Exception as error:  # noqa: BLE001 - the outermost frame, where whatever nobody foresaw ends
        if terminal.arrived:  # what an import or a worker made of the interruption
            _stopped(terminal, "")
        if isinstance(error, UserError):
            _fail(terminal, f"{error.code}: {error}", 2)
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `regraft methods | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        reason = " ".join(str(error).split()) or "no reason given"
        _fail(terminal, f"error: {type(error).__name__}: {reason}; {UNFORESEEN}", 1)


def _stopped(terminal: Terminal, left: str) -> NoReturn:
    """The end after a signal; `left` is what it leaves behind, in the words of whoever was interrupted."""
    number = terminal.arrived[0] if terminal.arrived else signal.SIGINT
    _fail(terminal, f"{WORDS[number]}; {left or terminal.interrupted}", 128 + number)


def _fail(terminal: Terminal, sentence: str, status: int) -> NoReturn:
    if terminal.debug:
        import traceback

        traceback.print_exc()
    sys.stderr.write(sentence + "\n")
    raise typer.Exit(status)


def _calm_others(terminal: Terminal) -> None:
    """Other packages' progress bars and log lines would tear ours apart."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if terminal.verbose else "error")
    if terminal.quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _show_warnings(terminal: Terminal) -> None:
    if not terminal.verbose and not terminal.debug:
        warnings.simplefilter("ignore")
    warnings.simplefilter("always", UserWarningMessage)

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if issubclass(category, UserWarningMessage):
            terminal.note(str(message))
        else:
            terminal.foreign(f"{category.__name__}: {message} ({filename}, line {lineno})")

    warnings.showwarning = show
