"""Where the fuzzer works: a tree of its own, watched from the inside (audit events) and the outside (its files' state).

`World.judge` gives one input to everything that reads such input, and says what went wrong: an exception that is no
`UserError`, a hang, memory, a file touched outside the output, a program started, an output that cannot be opened.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fuzz import seeds
from regraft.checkpoint import Checkpoint, numel, open_checkpoint
from regraft.errors import UserError
from regraft.inspect.compare import compare
from regraft.inspect.facts import look
from regraft.recipe import load_recipe
from regraft.recipe.run import check_merge
from regraft.recipe.run import merge as merge_recipe
from regraft.recipe.settings import Settings

MEMORY = 300 * 10**6  # bytes that one input may add to the process, at the peak and for good
_SETTINGS = Settings(offline=True, workers=1)
_PIECE = 1 << 20
_READ_AT_MOST = 1 << 24  # elements; a file cannot hold as many as a few strange strides can name
_WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.utime"}
_RUNS = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen"}


@dataclass
class Input:
    """What is given: references to open and to look at, a recipe to plan or to run, how much of it is done."""

    refs: list[str] = field(default_factory=list)
    recipe: str | bytes = ""
    run: bool = False  # make the model
    deep: bool = False  # also scan the values and compare with a good model, which asks transformers
    digest: str = ""  # what `full_digest` was before the damage that must not matter


class Hang(BaseException):
    """The alarm rang; no code of the library may catch it."""


@dataclass
class Failure:
    what: str
    trace: str = ""


class World:
    """Folders for one process, good models in them, and the watch over everything else."""

    def __init__(self, root: Path, seconds: float = 5.0) -> None:
        self.root, self.seconds = root, seconds
        self.case, self.out = root / "case", root / "out"
        for name in ("home", "tmp", "cwd", "secret"):
            (root / name).mkdir(parents=True)
        for i, name in enumerate(("base", "a", "b")):
            seeds.save_seed(root / "seeds" / name, i)
        seeds.save_adapter(root / "seeds" / "adapter")
        seeds.save_seed(root / "secret" / "model", 7)
        (root / "cwd" / "data.csv").write_text("text,label\nx,0\n")
        self._events: list[str] = []
        self._watching = False
        self._begun, self._rung, self._acting = 0.0, False, False
        self._before: dict[str, tuple[int, ...]] = {}
        sys.addaudithook(self._audit)

    def seed(self, name: str) -> Path:
        return self.root / "seeds" / name

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The process's own folders are those of this world, and its memory has an end."""
        before = {key: os.environ.get(key) for key in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HUB_OFFLINE")}
        place, limits = Path.cwd(), resource.getrlimit(resource.RLIMIT_AS)
        os.environ |= {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "XDG_CACHE_HOME": str(self.root / "tmp"),
            "HF_HUB_OFFLINE": "1",
        }
        os.chdir(self.root / "cwd")
        self._warm_up()
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 6 * 10**9, limits[1]))
        rang = signal.signal(signal.SIGALRM, self._alarm)
        self._before = self._state()
        try:
            yield
        finally:
            signal.signal(signal.SIGALRM, rang)
            resource.setrlimit(resource.RLIMIT_AS, limits)
            os.chdir(place)
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value

    def judge(self, make: Callable[[World], Input]) -> tuple[list[Failure], list[str]]:
        """Failures, and how each entry point answered ("worked" or an error's code)."""
        for folder in (self.case, self.out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        given = make(self)
        raw = given.recipe if isinstance(given.recipe, bytes) else given.recipe.encode("utf-8", "surrogatepass")
        (self.case / "recipe.yaml").write_bytes(raw)
        failures: list[Failure] = []
        answers: list[str] = []
        resident = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._events.clear()
        self._watching = True
        try:
            for act in self._acts(given):
                answers.append(self._answer(act, failures))
        finally:
            self._watching = False
        failures += [Failure(f"touched {event}") for event in self._events]
        if (peak := _status("VmHWM") - resident) > MEMORY:
            failures.append(Failure(f"{peak / 1e6:.0f} MB of memory at the peak"))
        if (now := self._state()) != self._before:
            changed = sorted(k for k in now.keys() | self._before.keys() if now.get(k) != self._before.get(k))
            failures.append(Failure(f"changed outside the output: {', '.join(changed)}"))
            self._before = now
        return failures, answers

    def _acts(self, given: Input) -> Iterator[Callable[[], None]]:
        for ref in given.refs:
            yield lambda ref=ref: self._open(ref, given)  # type: ignore[misc]
            yield lambda ref=ref: _look(ref, given.deep)  # type: ignore[misc]
        if given.recipe:
            yield lambda: self._recipe(self.case / "recipe.yaml", run=given.run)

    def _open(self, ref: str, given: Input) -> None:
        checkpoint = open_checkpoint(ref, offline=True)
        _read(checkpoint)
        assert len(checkpoint.digest()) == 64
        if given.digest:
            assert checkpoint.full_digest() == given.digest, "the values changed"
        if given.deep:
            good = open_checkpoint(str(self.seed("base")))
            json.dumps(compare([good, checkpoint]).to_dict(), default=str)

    def _recipe(self, path: Path, *, run: bool) -> None:
        recipe, out = load_recipe(path), self.out / "made"
        try:
            check_merge(recipe, out, _SETTINGS)
        except UserError as error:
            if error.code != "RG309":  # several results, or measurements: a recipe for `regraft run`
                raise
        if not run:
            return
        try:
            merge_recipe(recipe, out, _SETTINGS)
        except UserError:
            assert not out.exists(), "a merge that failed left a model"
            raise
        _read(open_checkpoint(str(out)))

    def _answer(self, act: Callable[[], None], failures: list[Failure]) -> str:
        self._begun, self._rung, self._acting = time.process_time(), False, True
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act()
                self._acting = False
        except UserError as error:
            if "\n" in str(error) or not error.what:
                failures.append(Failure(f"no sentence: {error.code} {str(error)!r}"))
            return error.code
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(Failure(f"{type(error).__name__}: {str(error)[:200]}", traceback.format_exc(limit=-6)))
            return "crashed"
        finally:
            self._acting = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return "worked"

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if not self._acting:
            return  # it rang on the way out
        # A machine that stood still rings too: who has used no processor time gets the same time again, once.
        if time.process_time() - self._begun < self.seconds / 2 and not self._rung:
            self._rung = True
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            return
        raise Hang(f"no answer after {self.seconds} s")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
            if writes and not self._allowed(path):
                self._events.append(f"{path!r} (opened for writing, {mode!r})")
        elif event in _RUNS or (event in _WRITES and not all(map(self._allowed, _touched(event, args)))):
            self._events.append(f"{args!r} ({event})")

    def _allowed(self, path: Any) -> bool:
        if isinstance(path, int):
            return True  # a descriptor, whose opening was seen
        absolute = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - links stay as they are
        return absolute.startswith((f"{self.out}/", "/dev/null", "/proc/self/")) or absolute.endswith(".pyc")

    def _state(self) -> dict[str, tuple[int, ...]]:
        """Size, time and inode of everything but the input and the output."""
        found: dict[str, tuple[int, ...]] = {}
        pending = [entry.path for entry in os.scandir(self.root) if entry.name not in ("case", "out")]
        while pending:
            path = pending.pop()
            status = os.lstat(path)
            folder = stat.S_ISDIR(status.st_mode)
            found[path] = (0 if folder else status.st_size, status.st_mtime_ns, status.st_ino)
            if folder:
                pending += [entry.path for entry in os.scandir(path)]
        return found

    def _warm_up(self) -> None:
        """What is imported and compiled once belongs to no input."""
        self.case.mkdir()
        self.out.mkdir()
        for i, text in enumerate(seeds.RECIPES):
            (self.case / "good.yaml").write_text(text.format(**{n: self.seed(n) for n in ("base", "a", "b")}))
            recipe = load_recipe(self.case / "good.yaml")
            if i != 1:
                _read(open_checkpoint(str(merge_recipe(recipe, self.out / str(i), _SETTINGS))))
        good = [open_checkpoint(str(self.seed(n))) for n in ("base", "a")]
        json.dumps(compare(good).to_dict(), default=str)
        _look(f"{self.seed('a')}+{self.seed('adapter')}", True)


def _touched(event: str, args: tuple[Any, ...]) -> list[Any]:
    """The paths that a call changes; those below an open folder written out."""
    if event == "os.rename":
        pairs = [(args[0], args[2]), (args[1], args[3])]
    elif event in ("os.link", "os.symlink"):
        pairs = [(args[1], args[-1])]
    else:
        pairs = [(args[0], args[-1] if len(args) > 1 else -1)]
    found = []
    for path, folder in pairs:
        relative = not isinstance(path, int) and not Path(os.fsdecode(path)).is_absolute()
        if relative and isinstance(folder, int) and folder >= 0 and event != "os.truncate":
            path = Path(f"/proc/self/fd/{folder}").readlink() / os.fsdecode(path)
        found.append(path)
    return found


def _look(ref: str, deep: bool) -> None:
    json.dumps(look(ref, stats=deep, offline=True).to_dict())


def _read(checkpoint: Checkpoint) -> None:
    """Every value of every tensor, in pieces."""
    assert checkpoint.tensors
    for name in (*checkpoint.tensors, *checkpoint.aliases):
        source = checkpoint.source(name)
        count = numel(source)
        assert count <= _READ_AT_MOST, f"{name} has {count} elements"
        pieces = [source.read(start, start + _PIECE) for start in range(0, count, _PIECE)]
        assert sum(piece.numel() for piece in pieces) == count
        assert all(piece.dtype == source.dtype for piece in pieces)
        assert not pieces or isinstance(pieces[0], torch.Tensor)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
