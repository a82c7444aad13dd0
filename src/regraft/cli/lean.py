"""What the command line leaves out to start sooner and to need less memory."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable

_COLLECT_EVERY = 200_000  # objects; importing torch makes as many, and hardly any of them is garbage


def collect_seldom() -> None:
    """Let the garbage collector wait until there may be garbage.

    With its usual threshold it looks through everything that has been imported time and again while importing goes on.
    """
    gc.set_threshold(_COLLECT_EVERY, *gc.get_threshold()[1:])


def leave_at_once() -> Callable[[int], None]:
    """Have the process end when it is done, without taking the interpreter's modules to pieces.

    Returns a function that takes the exit status; without a call to it the process ends as usual. Everything that was
    registered to happen at the end still happens: threads are waited for, exit handlers run, streams are flushed.
    """
    statuses: list[int] = []

    def leave() -> None:
        if statuses:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except (OSError, ValueError):
                return  # the usual end knows what to say of it
            os._exit(statuses[-1])

    atexit.register(leave)  # handlers run last in, first out: this one, registered before all imports, ends the row
    return statuses.append


def without_blas() -> None:
    """Import numba without scipy's linear algebra, which it binds to its own matrix products if it is there.

    regraft's compiled loops have none. A second BLAS library costs a third of a second and, where private memory is
    limited, more than is there: it maps buffers for every core, and waits for ever if it gets none.
    """
    if "numba" in sys.modules or "scipy.linalg" in sys.modules:
        return
    sys.modules["scipy.linalg"] = None  # type: ignore[assignment] # the import system's word for "not there"
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del sys.modules["scipy.linalg"]
