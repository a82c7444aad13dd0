"""Paths that come from outside, and references to models: what a name may point to, before anything is opened.

A model's folder is foreign material, so a name inside it (in an index, or a symbolic link) must not lead out of it.
One exception is needed: the Hub's cache keeps a revision as `<cache>/models--x/snapshots/<commit>/`, full of links to
`<cache>/models--x/blobs/<etag>`, which since huggingface_hub 2 may be links to `<cache>/blobs/<2 digits>/<64 digits>`.
A link is accepted as such if the folder, or one above it, lies directly in a folder called `snapshots`, and the link
ends in one of these two places, looked up from there; neither `blobs` may be a link itself.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from regraft.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_XET_HASH = re.compile(r"[0-9a-f]{64}")
_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LONGEST_NAME, _LONGEST_PART = 1024, 255  # bytes; asking for longer ones is an error of the system
_LFS_STUB_BYTES = 1024  # git-lfs takes larger files for content


@dataclass(frozen=True)
class Ref:
    """A reference to a model: a path or a Hub id, a revision of it, and adapters to be applied in this order."""

    model: str
    revision: str = ""
    adapters: tuple[Ref, ...] = ()

    def __str__(self) -> str:
        head = f"{self.model}@{self.revision}" if self.revision else self.model
        return "+".join([head, *map(str, self.adapters)])


def parse_ref(text: str, *, relative_to: Path | None = None) -> Ref:
    """Take `org/model@revision+./adapter@revision` apart.

    `+` and `@` are separators unless they belong to a path that exists: among several readings the one with the
    longest existing path wins. Relative paths are looked up below `relative_to` (default: the current folder).

    Raises:
        UserError: RG101 if a part is empty.
    """
    pieces = text.strip().split("+")
    refs: list[Ref] = []
    start = 0
    while start < len(pieces):
        for stop in range(len(pieces), start, -1):
            piece = "+".join(pieces[start:stop]).strip()
            if piece and exists(piece, relative_to):
                refs.append(Ref(piece))
                break
        else:
            stop = start + 1
            refs.append(_with_revision(pieces[start].strip(), text, relative_to))
        start = stop
    return Ref(refs[0].model, refs[0].revision, tuple(refs[1:]))


def _with_revision(piece: str, text: str, relative_to: Path | None) -> Ref:
    model, at, revision = piece, "", ""
    before = piece.rpartition("@")[0]
    if "@" in piece and (not before or not looks_like_path(before) or exists(before, relative_to)):
        model, at, revision = piece.rpartition("@")
    if not model or (at and not revision):
        fix = "write model, model@revision or model+adapter"
        raise UserError("RG101", "a part of the reference is empty", where=repr(text), fix=fix)
    return Ref(model, revision)


def looks_like_path(model: str) -> bool:
    """Whether a reference can only be a path: `./x`, `/x`, `~/x`, `x/`, `a/b/c`, `x.safetensors`."""
    return (
        model.startswith((".", "/", "~"))
        or model.endswith(("/", *WEIGHT_SUFFIXES, ".gguf"))
        or model.count("/") > 1
        or _HUB_ID.fullmatch(model) is None
    )


def located(model: str, relative_to: Path | None = None) -> Path:
    """The path that a reference means, should it be one: `~` expanded, relative ones below `relative_to`."""
    path = Path(expanded(model))
    return path if relative_to is None else relative_to / path


def expanded(text: str) -> str:
    """`~` and `~user` replaced by home folders, where there are such; other texts as they are."""
    try:
        return os.path.expanduser(text)  # noqa: PTH111 - Path.expanduser raises where the home folder is unknown
    except ValueError:  # a NUL, or half of a character, in the name of the user
        return text


def exists(model: str, relative_to: Path | None = None) -> bool:
    """Whether a reference is an existing path. Texts that no path can be are simply not there."""
    try:
        located(model, relative_to).stat()
    except (OSError, ValueError):
        return False
    return True


def not_found(model: str, path: Path) -> UserError:
    """RG101 for a path that does not exist, with the nearest names beside it."""
    hint = near(path)
    if not hint:
        parent = path.parent
        while parent != parent.parent and not exists(str(parent)):
            parent = parent.parent
        hint = "check the path" if parent == path.parent else f"the last folder of it that exists is {str(parent)!r}"
    return UserError("RG101", f"no such file or folder: {model!r}", where=str(path.absolute()), fix=hint)


def near(path: Path) -> str:
    """`did you mean 'x'?` with names in the parent folder that resemble this one; empty if there are none."""
    try:
        names = sorted(entry.name for entry in os.scandir(path.parent))
    except (OSError, ValueError):  # or the parent is a text that no path can be
        return ""
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return "did you mean " + " or ".join(repr(str(path.parent / name)) for name in close) + "?" if close else ""


def inside(folder: Path, name: str, *, where: Path | str) -> Path:
    """The path of `name` within `folder`, which need not exist.

    Args:
        folder: the model's folder.
        name: as an index or the listing of the folder gives it; `/` separates sub-folders.
        where: the file that gave the name, for the message.

    Raises:
        UserError: RG104 if the name is absolute, has `..` in it, or follows a link out of the folder.
    """
    pure = PurePosixPath(name)
    windows = PureWindowsPath(name)
    bad = not possible_name(name) or "\\" in name
    if bad or pure.is_absolute() or windows.drive or ".." in pure.parts or pure == PurePosixPath("."):
        what = f"{shown(name)} is no plain file name below the model's folder"
        raise UserError("RG104", what, where=str(where), fix="do not use this model, or repair its index")
    path = folder / pure
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # loops of links: RuntimeError before Python 3.13
        raise UserError("RG104", f"{name!r} is a link that leads nowhere", where=str(where), fix=str(error)) from None
    if not target.is_relative_to(root) and not _in_own_blobs(root, target):
        what = f"{name!r} is a link to {str(target)!r}, outside the model's folder"
        raise UserError("RG104", what, where=str(where), fix="replace the link by a copy of the file")
    return path


def possible_name(name: str) -> bool:
    """Whether a file system can have a file of this name, with folders before it."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    parts = encoded.split(b"/")
    return 0 < len(encoded) <= _LONGEST_NAME and b"\0" not in encoded and max(map(len, parts)) <= _LONGEST_PART


def _in_own_blobs(folder: Path, target: Path) -> bool:
    """Whether `target` is a blob in the Hub cache that the folder is a snapshot in; both paths are resolved."""
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots":
            repo = snapshot.parent.parent
            shared = repo.parent / "blobs" / target.name[:2] / target.name
            return target.parent == repo / "blobs" or (
                target == shared and _XET_HASH.fullmatch(target.name) is not None
            )
    return False


def regular_size(path: Path) -> int:
    """Size of a regular file in bytes; what is no file (a pipe, a device) is never opened.

    Raises:
        UserError: RG101 if it is missing, no regular file, or cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        what, fix = f"the file cannot be read: {error.strerror}", "check the path and its permissions"
        raise UserError("RG101", what, where=str(path), fix=fix) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError("RG101", "this is no regular file", where=str(path), fix="name a file or a model's folder")
    return status.st_size


def head(path: Path, size: int = 64) -> bytes:
    """The first bytes of a regular file.

    Raises:
        UserError: RG101 if it cannot be read; RG106 if it is a stub of git-LFS.
    """
    length = regular_size(path)
    try:
        with path.open("rb") as file:
            first = file.read(max(size, 64))
    except OSError as error:
        what, fix = f"the file cannot be read: {error.strerror}", "check its permissions"
        raise UserError("RG101", what, where=str(path), fix=fix) from None
    if length <= _LFS_STUB_BYTES and first.startswith(_LFS):
        fix = "run `git lfs pull` in the folder, or download the model again"
        raise UserError("RG106", "this is a git-LFS pointer, not the file itself", where=str(path), fix=fix)
    return first[:size]


def cache_folder(name: str) -> Path:
    """The folder `name` of regraft's cache: below REGRAFT_CACHE, else below `regraft` in XDG_CACHE_HOME or `~/.cache`.

    A relative path if the user has no home folder.
    """
    own, given = (Path(os.environ.get(variable, "")) for variable in ("REGRAFT_CACHE", "XDG_CACHE_HOME"))
    if own.is_absolute():
        return own / name
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home raises where the home folder is unknown
    return (given if given.is_absolute() else home / ".cache") / "regraft" / name


def shown(text: object, limit: int = 100) -> str:
    """`repr` of something foreign, cut to a length that fits into a sentence."""
    try:
        written = repr(text[: limit + 1] if isinstance(text, (str, bytes)) else text)
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        written = f"a very long {type(text).__name__}"
    return written if len(written) <= limit else written[: limit - 3] + "..."
