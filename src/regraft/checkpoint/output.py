"""A folder that appears all at once: made in a staging folder beside its final place, then renamed.

A run that dies leaves at most `.NAME.regraft-partial`, `.NAME.regraft-old` and `.NAME.regraft-lock`; the next run
into the same output clears them away, and puts an old output back if it had been moved aside. Two runs into one
output are told apart by a lock that the system releases when its process ends: no age or process id is guessed.
The trade-off: while an old output is replaced, both copies need room on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from regraft.errors import UserError, UserWarningMessage

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class OutputFolder:
    """The folder `out`, filled through `staging`.

    The constructor checks and creates nothing. Entering the context takes the lock and makes `staging`; leaving it
    without `publish`, by an exception or not, removes both again.

    Args:
        out: the folder to make; it may exist if it is empty, or hold a model if `force`. A link to a folder stands
            for the folder.
        force: replace a model that is in `out` already.
        need_bytes: room that the staging folder will need.

    Raises:
        UserError: RG401 (`out` is a file, is not empty, holds no model to replace, or is being written by another
            run), RG402 (too little disk), RG405 (parent missing or read-only, `out` is no ordinary folder).
    """

    def __init__(self, out: Path, *, force: bool = False, need_bytes: int = 0) -> None:
        self.out = Path(os.path.realpath(out))
        self._force = force
        beside = self.out.parent
        self.staging = beside / f".{self.out.name}.regraft-partial"
        self._old = beside / f".{self.out.name}.regraft-old"
        self._lock_path = beside / f".{self.out.name}.regraft-lock"
        self._lock: int | None = None
        self.active = False
        try:
            _check_parent(self.out)
            _check_out(self.out, force)
        except OSError as error:
            raise explained(error, self.out) from error
        _check_room(beside, need_bytes)

    def __enter__(self) -> OutputFolder:
        try:
            self._lock = _take_lock(self._lock_path, self.out)
            self._recover()
            _check_out(self.out, self._force)
            self.active = True
            self.staging.mkdir()
        except OSError as error:
            self.abort()
            raise explained(error, self.out) from error
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise explained(error, self.out) from error

    def publish(self) -> None:
        """Rename staging to `out` once everything in it has reached the disk; an old output is deleted after that.

        Raises:
            RuntimeError: the folder is not open.
            UserError: RG401 if something else appeared in `out` meanwhile, RG402, RG405; nothing is left then.
        """
        if not self.active:
            raise RuntimeError("the output folder is not open")
        try:
            _sync_tree(self.staging)
            occupied = self.out.exists() and any(self.out.iterdir())
            if occupied and not self._force:
                raise _not_empty(self.out)
            if occupied:
                self.out.rename(self._old)
            self.staging.rename(self.out)
            _sync(self.out.parent)
        except OSError as error:
            self.abort()
            raise explained(error, self.out) from error
        self.active = False
        try:
            _remove(self._old)
        except OSError as error:
            message = f"the replaced model could not be deleted and is still at {self._old.name}: {error.strerror}"
            warnings.warn(message, UserWarningMessage, stacklevel=2)
        self._release()

    def abort(self) -> None:
        """Remove staging folder and lock, and put an old output back. Does nothing after `publish`."""
        try:
            if self.active:
                self.active = False
                self._recover()
        finally:
            self._release()

    def _recover(self) -> None:
        """Clear away an unfinished run, this one or one that died; called with the lock held."""
        _remove(self.staging)
        if self._old.exists():
            if self.out.exists():
                _remove(self._old)  # the new output was in place already
            else:
                self._old.rename(self.out)

    def _release(self) -> None:
        if self._lock is not None:
            # Unlinked before it is released: whoever opened it meanwhile sees that it is no longer the file at
            # this path and starts again (see _take_lock).
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def explained(error: OSError, out: Path) -> Exception:
    """The sentence for a failure of the file system; failures that are nobody's input stay what they are."""
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        fix = "free some space, write smaller shards, or name an output on another disk"
        return UserError("RG402", f"the disk took no more: {reason}", where=str(out), fix=fix)
    if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
        return _not_empty(out)
    if error.errno in _NOT_WRITABLE:
        return UserError("RG405", f"the output cannot be written: {reason}", where=str(out), fix="name another output")
    return error


def _not_empty(out: Path) -> UserError:
    fix = "name another folder, or give --force to replace it"
    return UserError("RG401", "the output folder is not empty", where=str(out), fix=fix)


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError("RG401", "the output is a file", where=str(out), fix="name a folder that does not exist yet")
    if Path.cwd().is_relative_to(out) or os.path.ismount(out):
        what = "the output is the folder that regraft runs in, one above it, or a mount point"
        raise UserError("RG405", what, where=str(out), fix="name a new folder inside it")
    names = {entry.name for entry in out.iterdir()}
    if names and not force:
        raise _not_empty(out)
    # --force deletes a whole folder: a mistyped path must not cost anything but a model.
    has_model = {"config.json", "regraft.json"} & names or any(n.endswith((".safetensors", ".bin")) for n in names)
    if names and (not has_model or ".git" in names):
        kind = "is a git repository" if ".git" in names else "holds no model"
        what = f"the output folder {kind}, and --force replaces nothing but models"
        raise UserError("RG401", what, where=str(out), fix="name another folder")


def _check_parent(out: Path) -> None:
    parent = out.parent
    if parent.exists() and not parent.is_dir():
        raise UserError("RG405", "the output's parent is a file", where=str(parent), fix="name another output")
    if not parent.exists():
        what = "the folder that is to hold the output does not exist"
        raise UserError("RG405", what, where=str(parent), fix=f"mkdir -p '{parent}'")
    if not os.access(parent, os.W_OK | os.X_OK):
        what = "the folder that is to hold the output is read-only"
        raise UserError("RG405", what, where=str(parent), fix="change its permissions or name another output")


def _check_room(parent: Path, need: int) -> None:
    free = shutil.disk_usage(parent).free
    if need > free:
        what = f"the output needs {_size(need)} and {_size(free)} are free"
        raise UserError("RG402", what, where=str(parent), fix="free some space or name an output on another disk")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 10**7 else f"{n / 1e6:.3f} MB"


def _take_lock(path: Path, out: Path) -> int:
    """An open descriptor that holds the lock of `out`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            fix = "wait for it to end, or name another output"
            raise UserError("RG401", "another run is writing this output", where=str(out), fix=fix) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            message = "this file system has no locks: a second run into the same output would not be noticed"
            warnings.warn(message, UserWarningMessage, stacklevel=3)
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its holder ended and unlinked it between our two calls


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
