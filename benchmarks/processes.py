"""A command as a whole process: its time, its processors' time, and the most memory that it and its children had.

Private memory is what belongs to the process alone: anonymous memory and shared memory, not pages of files. On Linux it
is RssAnon + RssShmem of /proc/PID/status, elsewhere the unique set size that psutil tells.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
_FIELDS = {"RssAnon": "private", "RssShmem": "private", "VmHWM": "resident", "VmData": "data"}


@dataclass(frozen=True)
class Measured:
    """What a process took. Memory in bytes; 0 where this system does not tell it.

    `private` is the highest sum over the process and its children of private resident memory. `resident` is the
    same for the largest resident set, with the pages of mapped files; `data` the largest private writable address
    space, which is what RLIMIT_DATA limits.
    """

    status: int
    wall: float
    cpu: float
    private: int
    resident: int
    data: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(
    argv: Sequence[str],
    *,
    cwd: Path,
    log: Path,
    env: Mapping[str, str],
    limit_data: int | None = None,
    timeout: float = 3600,
) -> Measured:
    """Run a command to its end and measure it.

    Args:
        log: file for everything that it prints.
        env: all variables that it sees.
        limit_data: most bytes of private writable memory that it may have (RLIMIT_DATA; Linux).
        timeout: seconds after which it is killed, with its children; the status is -9 then.
    """
    if limit_data is not None:
        limit = "import os,resource,sys; n=int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_DATA,(n,n)); "
        argv = [sys.executable, "-c", f"{limit}os.execvp(sys.argv[2],sys.argv[2:])", str(limit_data), *argv]
    with log.open("wb") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended with its children
        )
        peaks = _Peaks(process.pid, begun + timeout)
        peaks.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        finally:
            peaks.stop()
        wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    found = peaks.found
    return Measured(
        process.returncode,
        wall,
        usage.ru_utime + usage.ru_stime,
        found.get("private", 0),
        found.get("resident", 0),
        found.get("data", 0),
    )


class _Peaks(threading.Thread):
    """Samples the memory of a process and its children until it is stopped; ends them at a moment of `perf_counter`."""

    def __init__(self, pid: int, end: float) -> None:
        super().__init__(daemon=True)
        self.found: dict[str, int] = {}
        self._pid, self._end = pid, end
        self._ended = threading.Event()

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        read = _read_linux if sys.platform == "linux" else _read_psutil
        while True:
            for name, value in read(self._pid).items():
                self.found[name] = max(self.found.get(name, 0), value)
            if self._ended.wait(SAMPLE_SECONDS):
                return
            if time.perf_counter() > self._end:
                os.killpg(self._pid, signal.SIGKILL)
                return


def _read_linux(pid: int) -> dict[str, int]:
    """Sums over the process and its descendants, now; {} if it is gone."""
    total: dict[str, int] = {}
    waiting = [pid]
    while waiting:
        one = Path("/proc") / str(waiting.pop())
        try:
            for line in (one / "status").read_text(encoding="ascii", errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name in _FIELDS:
                    total[_FIELDS[name]] = total.get(_FIELDS[name], 0) + int(value.split()[0]) * 1024
            for task in (one / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text(encoding="ascii").split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it, or one of its threads, ended while it was looked at
    return total


def _read_psutil(pid: int) -> dict[str, int]:
    import psutil  # type: ignore[import-untyped]

    total = {"private": 0, "resident": 0}
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            memory = one.memory_full_info()
            total["private"] += memory.uss
            total["resident"] += memory.rss
    except psutil.NoSuchProcess:
        pass
    return total


def warm(files: Sequence[Path]) -> None:
    """Read files to the end, so that they are in the page cache as far as they fit."""
    buffer = memoryview(bytearray(1 << 24))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
