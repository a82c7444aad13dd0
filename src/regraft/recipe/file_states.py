"""What tells, without reading them, whether files are still those that a run saw.

A file counts as unchanged while its size, its times of change and its inode are the ones recorded. One case needs more:
a file that changed just before it was looked at may change once more within the same tick of its file system's clock
and keep its times. Small files of that kind are recorded with a hash of their bytes, large ones are looked at again
once the tick has passed, and where a tick is too long to wait for, nothing is recorded.

Imports nothing but the standard library: the command line asks before it imports anything that takes time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

# Path -> [size, mtime in ns, ctime in ns, inode], and a hash where the times are not enough.
States: TypeAlias = "dict[str, list[Any]]"

_FINE_NS = 100_000_000  # file systems that count in micro- or nanoseconds tick every few milliseconds
_COARSE_NS = 2_000_000_000  # others tick every second, FAT every two
_HASHED_BYTES = 64 << 20  # most that is hashed of one set of files
_MOST_FILES = 20_000
_OF_TOOLS = (".git", ".cache")  # folders that tools write into at any time, and that no model is read from
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class UnknownState(Exception):
    """The state of some files cannot be told well enough to rely on it; `str()` says why."""


def observe(paths: Iterable[str]) -> States:
    """The state of files as they are now; waits for at most a tenth of a second per large file.

    Raises:
        UnknownState: a large file has changed too recently.
        OSError: a file cannot be looked at.
    """
    states: States = {}
    left = _HASHED_BYTES
    for path in paths:
        state = _state(path)
        if _unsettled(state) > 0 and state[0] > left:
            if _unsettled(state) <= _FINE_NS:
                time.sleep(_unsettled(state) / 1e9)
                state = _state(path)
            if _unsettled(state) > 0:
                raise UnknownState(f"{path} has only just changed")
        elif _unsettled(state) > 0:
            left -= state[0]
            state.append(_hash(path))
        states[path] = state
    return states


def unchanged(recorded: Mapping[str, list[Any]], paths: Iterable[str]) -> bool:
    """Whether `paths` are the files recorded by `observe`, each in the state that it had then.

    Raises:
        OSError: a file cannot be looked at.
    """
    found = set(paths)
    return (
        found == recorded.keys()
        and all(_state(path) == recorded[path][:4] for path in found)
        and all(_hash(path) == recorded[path][4] for path in found if len(recorded[path]) > 4)
    )


def files_below(root: str, without: Collection[str] = ()) -> Iterator[str]:
    """The file `root`, or all files below the folder `root` in any order.

    Links are followed, each folder is entered once, `.git` and `.cache` never. A root that does not exist has no files.

    Args:
        root: an absolute path.
        without: real paths of folders that are not entered.

    Raises:
        UnknownState: there are more files than it is sensible to look at.
        OSError: a folder cannot be read.
    """
    if not Path(root).is_dir():
        if Path(root).is_file():
            yield root
        return
    count, folders, closed = 0, [root], {os.path.realpath(root), *without}
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                if count > _MOST_FILES:
                    raise UnknownState(f"there are more than {_MOST_FILES:,} files below {root}")
                if entry.is_file():
                    yield entry.path
                elif entry.is_dir() and entry.name not in _OF_TOOLS and (real := _real(entry)) not in closed:
                    closed.add(real)
                    folders.append(entry.path)


def data_files(path: Path) -> list[Path]:
    """A data file, or the files of a folder of data, sorted."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def pictures_beside(path: Path) -> list[Path]:
    """The images that the rows of a data file may name, sorted: those in its folder and below."""
    return sorted(p for p in path.parent.rglob("*") if p.suffix.lower() in _PICTURES and p.is_file())


def _real(folder: os.DirEntry[str]) -> str:
    return os.path.realpath(folder.path)


def _state(path: str) -> list[Any]:
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _unsettled(state: list[Any]) -> int:
    """Nanoseconds for which a further change of the file might still leave its times as they are; 0 or less if none."""
    newest = max(state[1], state[2])
    tick = _FINE_NS if newest % 1_000_000 else _COARSE_NS
    return int(newest + tick - time.time_ns())


def _hash(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:  # noqa: PTH123 - a path as text, like everything here
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
