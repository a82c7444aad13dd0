"""What the command line leaves out to start sooner and to need less memory."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

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


def import_later(name: str) -> None:
    """Have `import name` cost nothing until something of the module is asked for, by whichever thread.

    Nothing is done if it is imported already or not installed. importlib's own LazyLoader does not let other threads
    wait for the one that imports (before Python 3.12).
    """
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        return
    _LOADING[name] = _Loading(spec)
    sys.modules[name] = _Later(name)
    vars(sys.modules[name]).update(__spec__=spec, __loader__=spec.loader, __file__=spec.origin)


class _Loading:
    """The one import of a module: the thread that does it sees the module as it is by then, others when it is whole."""

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec = spec
        self._lock = threading.RLock()
        self._begun = False

    def load(self, module: ModuleType) -> None:
        with self._lock:
            if self._begun:
                return
            self._begun = True
            try:
                vars(module).update(vars(importlib.util.module_from_spec(self._spec)))
                assert self._spec.loader is not None
                self._spec.loader.exec_module(module)
            except BaseException:
                self._begun = False
                raise
            if type(module) is _Later:
                module.__class__ = ModuleType  # type: ignore[assignment]


_LOADING: dict[str, _Loading] = {}
# What is looked at, of all modules, by those who want nothing of this one.
_TOLD_AT_ONCE = ("__class__", "__dict__", "__file__", "__loader__", "__name__", "__spec__")


class _Later(ModuleType):
    """Stands for a module, and becomes it when something of it is asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name not in _TOLD_AT_ONCE:
            _LOADING[ModuleType.__getattribute__(self, "__name__")].load(self)
        return ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__class__":
            _LOADING[self.__name__].load(self)
        ModuleType.__setattr__(self, name, value)
