"""Ctrl-C and SIGTERM, alike: an exception that unwinds the run, so that what is cleaned up is cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def stopping(arrived: list[signal.Signals]) -> Iterator[None]:
    """Within the context both signals raise KeyboardInterrupt, after they are entered in `arrived`.

    A signal that the parent process told this one to ignore, as `nohup` and job control do, stays ignored. Does nothing
    outside the main thread, where Python delivers no signals.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in WORDS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_at_once() -> None:
    """From here on both signals end the process without a word, for when it has said its last one."""
    for number in WORDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
