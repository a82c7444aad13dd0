"""What an unfinished run has finished, so that the same run goes on from there after a kill.

A file of lines in the staging folder, each a CRC-32 and a JSON value. The first says what the values depend on and on
which files they lie; every other one names a tensor all of whose elements have been written, with what was learnt while
it was computed. A line is appended by one write after the data, so whatever is read of it was preceded by the data. A
torn last line is as if it had never been; a damaged line ends what is believed.

What makes this sound without waiting for the disk: a killed process leaves everything that it wrote in the system's
page cache. Whatever empties that cache (a power cut, a crash, a restart) also gives the machine a new boot id, which
the first line holds, and such a journal is not believed. Systems that tell no boot id do not resume. Copies of a
staging folder are not believed either, since their files have other inodes. Not noticed is a disk that is pulled out
while the machine runs, without being unmounted: delete the staging folder then.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

FILE_NAME = ".regraft-journal"
_FORMAT = 1
_LIMIT = 1 << 30  # bytes; a journal has some hundred bytes a tensor
_LINE = re.compile(rb"([0-9a-f]{8}) (.*)")


class Journal:
    """Finished tensors of one run; made by `create` or `adopt`.

    Attributes:
        path: the file.
        finished: what earlier runs finished, in their order: tensor name -> what was learnt of it.
    """

    def __init__(self, path: Path, descriptor: int, finished: Mapping[str, dict[str, Any]]) -> None:
        self.path, self.finished = path, finished
        self.count = len(finished)
        self._descriptor: int | None = descriptor
        self._mutex = threading.Lock()

    @classmethod
    def create(cls, path: Path, identity: Mapping[str, Any]) -> Journal:
        """A new journal, for values that depend on `identity` (JSON-able) and on nothing else.

        Raises:
            OSError: whatever keeps it from being written.
        """
        journal = cls(path, _opened(path, os.O_CREAT | os.O_EXCL), {})
        journal._append(_named(identity))
        return journal

    @classmethod
    def adopt(cls, path: Path, identity: Mapping[str, Any], names: Collection[str]) -> Journal | None:
        """The journal at `path`, to be gone on with; None if it is not one of this identity that can be believed.

        Args:
            path, identity: as for `create`.
            names: the tensors that there are.

        Raises:
            OSError: whatever keeps a file that is there from being read.
        """
        try:
            descriptor = _opened(path, 0)
        except FileNotFoundError:
            return None
        finished: dict[str, dict[str, Any]] = {}
        believed = 0
        try:
            if os.fstat(descriptor).st_size <= _LIMIT:
                for line in path.read_bytes().splitlines(keepends=True):
                    value = _value(line)
                    if not believed:
                        if value is None or value != json.loads(json.dumps(_named(identity))):
                            break
                    elif not _is_finished(value, names):
                        break
                    else:
                        finished[value[0]] = value[1]
                    believed += len(line)
            if believed:
                os.ftruncate(descriptor, believed)  # what is appended now must not follow a torn line
        except BaseException:
            os.close(descriptor)
            raise
        if believed:
            return cls(path, descriptor, finished)
        os.close(descriptor)
        return None

    def add(self, name: str, facts: Mapping[str, Any]) -> None:
        """Note that a tensor is finished: all of its elements have been written. Thread-safe.

        Args:
            name: the tensor.
            facts: JSON-able; floats come back as they are, also those that are not finite.

        Raises:
            OSError: the line could not be written as a whole.
            RuntimeError: the journal is closed.
        """
        with self._mutex:
            self._append([name, facts])
            self.count += 1

    def close(self) -> None:
        """Close the file; `add` is refused from now on."""
        with self._mutex:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _append(self, value: Any) -> None:
        if self._descriptor is None:
            raise RuntimeError("the journal is closed")
        text = json.dumps(value, separators=(",", ":")).encode("ascii")
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        if os.write(self._descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


@cache
def boot_id() -> str:
    """What names the time since the machine was started; "" where the system does not tell."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _opened(path: Path, flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644)


def _named(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "boot": boot_id(), **identity}


def _is_finished(value: Any, names: Collection[str]) -> TypeGuard[list[Any]]:
    whole = isinstance(value, list) and len(value) == 2
    return whole and isinstance(value[0], str) and value[0] in names and isinstance(value[1], dict)


def _value(line: bytes) -> Any | None:
    """What a line says, None if it is torn or damaged."""
    found = _LINE.fullmatch(line[:-1]) if line.endswith(b"\n") else None
    if not found or int(found[1], 16) != zlib.crc32(found[2]):
        return None
    try:
        return json.loads(found[2])
    except (ValueError, RecursionError):
        return None
