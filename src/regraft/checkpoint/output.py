"""A folder that appears all at once: made in a staging folder beside its final place, then renamed.

A run that dies leaves at most `.NAME.regraft-partial`, `.NAME.regraft-old` and `.NAME.regraft-lock`; the next run
into the same output puts an old output back if it had been moved aside, goes on with the staging folder if it can (the
caller decides, see `ModelWriter`), and clears the rest away. Two runs into one output are told apart by a lock that the
system releases when its process ends: no age or process id is guessed. The trade-off: while an old output is replaced,
both copies need room on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from regraft.errors import UserError, UserWarningMessage

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class OutputBusy(UserError):
    """Another run is writing this output."""


class OutputFolder:
    """The folder `out`, filled through `staging`.

    The constructor checks and creates nothing. Entering the context takes the lock and makes `staging`; leaving it
    without `publish`, by an exception or not, removes both again, unless `abort(keep=True)` came before.

    Args:
        out: the folder to make; it may exist if it is empty, or hold a model if `force`. A link to a folder stands
            for the folder.
        force: replace a model that is in `out` already.
        sync: wait for the disk before the output gets its name.
        need_bytes: room that the staging folder will need.
        adopt: asked, with the lock held, whether this run goes on with a staging folder that is there; what it does
            not want is removed.

    Raises:
        UserError: RG401 (`out` is a file, is not empty, holds no model to replace, or is being written by another
            run), RG402 (too little disk), RG405 (parent missing or read-only, `out` is no ordinary folder).
    """

    def __init__(
        self,
        out: Path,
        *,
        force: bool = False,
        sync: bool = True,
        need_bytes: int = 0,
        adopt: Callable[[Path], bool] = lambda staging: False,
    ) -> None:
        self.out = Path(os.path.realpath(out))
        self._force, self._sync, self._adopt = force, sync, adopt
        self.staging = staging_of(self.out)
        self._old = _beside(self.out, "old")
        self._lock: int | None = None
        self.active = False
        try:
            _check_parent(self.out)
            _check_out(self.out, force)
        except OSError as error:
            raise explained(error, self.out) from error
        _check_room(self.out.parent, need_bytes, reserved(self.out))

    def __enter__(self) -> OutputFolder:
        try:
            self._lock = _take_lock(self.out)
            _restore_old(self.out)
            _check_out(self.out, self._force)
            self.active = True
            kept = self.staging.is_dir() and not self.staging.is_symlink() and self._adopt(self.staging)
            if not kept:
                remove(self.staging)
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
        if isinstance(error, OSError) and error.errno in {*DISK_FULL, errno.EIO}:
            raise explained(error, self.out) from error

    def publish(self, *, without: str = "") -> None:
        """Rename staging to `out`, with `sync` once everything in it has reached the disk; an old one goes after that.

        Args:
            without: a file of staging that is no part of the output. It goes last, when everything else is there.

        Raises:
            RuntimeError: the folder is not open.
            UserError: RG401 if something else appeared in `out` meanwhile, with the folder still open; RG402, RG405,
                when nothing is left.
        """
        if not self.active:
            raise RuntimeError("the output folder is not open")
        try:
            if self._occupied() and not self._force:
                raise _not_empty(self.out)
            if self._sync or self._occupied():  # an old output goes away only for one that is there to stay
                _sync_tree(self.staging, without)
            elif without:
                (self.staging / without).unlink()
            if self._occupied() and not self._force:
                raise _not_empty(self.out)
            if self._occupied():
                self.out.rename(self._old)
            self.staging.rename(self.out)
            if self._sync:
                _sync(self.out.parent)
        except OSError as error:
            self.abort()
            raise explained(error, self.out) from error
        self.active = False
        try:
            remove(self._old)
        except OSError as error:
            message = f"the replaced model could not be deleted and is still at {self._old.name}: {error.strerror}"
            warnings.warn(message, UserWarningMessage, stacklevel=2)
        self._release()

    def abort(self, *, keep: bool = False) -> None:
        """Remove staging folder (unless `keep`) and lock, and put an old output back. Does nothing after `publish`."""
        try:
            if self.active:
                self.active = False
                if not keep:
                    remove(self.staging)
                _restore_old(self.out)
        finally:
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            _drop_lock(self._lock, self.out)
            self._lock = None

    def _occupied(self) -> bool:
        return self.out.exists() and any(self.out.iterdir())


def staging_of(out: Path) -> Path:
    """Where an output is made before it gets its name."""
    return _beside(Path(os.path.realpath(out)), "partial")


def reserved(out: Path) -> int:
    """Bytes on the disk that an unfinished run into `out` holds; the next one uses them or gives them back."""
    held = 0
    for parent, _, files in os.walk(staging_of(out)):
        for name in files:
            with suppress(FileNotFoundError):  # its run may be going on
                held += Path(parent, name).lstat().st_blocks * 512
    return held


def unfinished_in(folder: Path) -> list[Path]:
    """The outputs in `folder` into which a run did not end, or is going on."""
    if not folder.is_dir():
        return []
    end = _beside(folder / "x", "partial").name.removeprefix(".x")
    return sorted(folder / path.name[1 : -len(end)] for path in folder.iterdir() if path.name.endswith(end))


def clear_leftovers(out: Path) -> None:
    """Remove what runs into `out` that died have left beside it, unless another run is writing it right now.

    Entering an output does this by itself; this is for an output that is as wanted and will not be entered.

    Raises:
        UserError: RG405 if it cannot be removed.
    """
    out = Path(os.path.realpath(out))
    if not any(os.path.lexists(_beside(out, kind)) for kind in ("partial", "old", "lock")):
        return
    try:
        with suppress(OutputBusy):
            lock = _take_lock(out)
            try:
                remove(_beside(out, "partial"))
                _restore_old(out)
            finally:
                _drop_lock(lock, out)
    except OSError as error:
        raise explained(error, out) from error


def _beside(out: Path, kind: str) -> Path:
    return out.parent / f".{out.name}.regraft-{kind}"


def _restore_old(out: Path) -> None:
    """Settle the swap of a run that ended within it, this one or one that died; called with the lock held."""
    old = _beside(out, "old")
    if old.exists():
        if out.exists():
            remove(old)  # the new output was in place already
        else:
            old.rename(out)


def explained(error: OSError, out: Path) -> Exception:
    """The sentence for a failure of the file system; failures that are nobody's input stay what they are."""
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        fix = "free some space, write smaller shards, or name an output on another disk"
        return UserError("RG402", f"the disk took no more: {reason}", where=str(out), fix=fix)
    if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
        return _not_empty(out)
    if error.errno == errno.EIO:
        what, fix = f"the disk failed: {reason}", "check the disk, or name an output on another one"
        return UserError("RG405", what, where=str(out), fix=fix)
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


def _check_room(parent: Path, need: int, held: int) -> None:
    free = shutil.disk_usage(parent).free + held
    if need > free:
        what = f"the output needs {_size(need)} and {_size(free)} are free"
        raise UserError("RG402", what, where=str(parent), fix="free some space or name an output on another disk")


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 10**7 else f"{n / 1e6:.3f} MB"


def _take_lock(out: Path) -> int:
    """An open descriptor that holds the lock of `out`."""
    path = _beside(out, "lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            fix = "wait for it to end, or name another output"
            raise OutputBusy("RG401", "another run is writing this output", where=str(out), fix=fix) from None
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


def _drop_lock(descriptor: int, out: Path) -> None:
    # Unlinked before it is released: whoever opened it meanwhile sees that it is no longer the file at this path and
    # starts again (see _take_lock).
    _beside(out, "lock").unlink(missing_ok=True)
    os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path, without: str = "") -> None:
    tree = list(os.walk(folder))
    for parent, _, files in tree:
        for name in files:
            _sync(Path(parent, name))
    if without:
        (folder / without).unlink()
    for parent, _, _ in tree:
        _sync(Path(parent))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
