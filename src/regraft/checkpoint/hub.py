"""Models from the Hugging Face Hub: listed before anything is downloaded, checked before anything is believed.

One request tells the commit and the files with their sizes and hashes. From that list the few files are chosen that
merging needs, the room on the disk is checked, and the files go into the Hub's usual cache one after another, weights
last. A file that is new in the cache is compared with the list by size and hash and is thrown out if it differs, so
that what stays in the cache is what the Hub has. Online never turns into offline silently: if the Hub does not answer,
that is an error, which says whether the cache would do.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.checkpoint.hub_errors import explained, is_passing
from regraft.checkpoint.hub_files import choose, shards
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.weights import listed
from regraft.errors import UserError

_WAITS = (1.0, 3.0)  # seconds before the second and the third attempt to list a model
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class _Listed:
    """A file as the Hub lists it: bytes, and its hash as SHA-256 (large files) or as a git blob (small ones)."""

    size: int | None
    sha256: str
    git_sha1: str


def fetch(repo_id: str, revision: str, *, offline: bool) -> tuple[Path, str]:
    """Bring a model or an adapter into the Hub's local cache.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are read when this is called; the cache is huggingface_hub's.

    Args:
        repo_id: such as "org/name".
        revision: a branch, tag or commit; "" is the default branch.
        offline: use the cache only.

    Returns:
        The folder of the snapshot, and the commit hash that it is of.

    Raises:
        UserError: RG501 (no answer; or offline, and something is not in the cache), RG502 (no such model or revision,
            private, gated), RG503 (a download that does not match the list), RG102 (no weights that can be read),
            RG402 (disk full), RG405 (the cache cannot be written).
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError:
        fix = "write org/name, or check the path if a folder is meant"
        raise UserError("RG502", f"{repo_id!r} is no id of a model on the Hub", fix=fix) from None
    repo = _Repo(repo_id, revision or constants.DEFAULT_REVISION, f"{repo_id}@{revision}" if revision else repo_id)
    if offline or constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        return repo.cached()
    with _quiet():
        return repo.downloaded()


class _Repo:
    """One revision of a model on the Hub, and its place in the cache."""

    def __init__(self, repo_id: str, revision: str, where: str) -> None:
        from huggingface_hub import constants

        self.repo_id, self.revision, self.where = repo_id, revision, where
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
        self.folder = self.cache / "--".join(["models", *repo_id.split("/")])

    def cached(self) -> tuple[Path, str]:
        """The snapshot in the cache, if it holds all files that are needed.

        Raises:
            UserError: RG501, with what is missing.
        """
        if not self.folder.is_dir():
            raise self._missing(f"{self.repo_id} is not in the local cache")
        commit = self.revision if _COMMIT.fullmatch(self.revision) else self._resolved()
        snapshot = self.folder / "snapshots" / commit
        if not commit or not snapshot.is_dir():
            raise self._missing(f"the local cache has {self.repo_id}, but not its revision {self.revision!r}")
        names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
        try:
            choice = choose(names, self.where, _named_weights(snapshot))
        except UserError as error:
            raise self._missing(f"the local cache has {self.repo_id}, but none of its weights") from error
        if choice.index:
            given = read_json(snapshot / choice.index).get("weight_map")
            wanted = set(given.values()) if isinstance(given, dict) else set()
            lacking = sorted(str(name) for name in wanted if name not in names)
            if lacking:
                raise self._missing(f"the local cache has {self.repo_id}, but not its {listed(lacking)}")
        elif not {"config.json", "adapter_config.json", "delta.json"} & names:
            raise self._missing(f"the local cache has {self.repo_id}, but not its config.json")
        return snapshot, commit

    def downloaded(self) -> tuple[Path, str]:
        """The snapshot after everything that it lacked was downloaded."""
        commit, files = self._list()
        snapshot = self.folder / "snapshots" / commit
        if "config.json" in files:
            self._download("config.json", commit, files["config.json"])
        choice = choose(files, self.where, _named_weights(snapshot))
        first = [*choice.small, *([choice.index] if choice.index else [])]
        self._check_disk(snapshot, [*first, *choice.weights], files)
        for name in first:
            self._download(name, commit, files[name])
        weights = list(choice.weights)
        if choice.index:
            weights += shards(read_json(snapshot / choice.index), files, self.where)
        self._check_disk(snapshot, weights, files)
        for name in weights:
            self._download(name, commit, files[name])
        self._remember(commit)
        return snapshot, commit

    def _list(self) -> tuple[str, dict[str, _Listed]]:
        """The commit that the revision means now, and its files."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HTTPError

        api = HfApi(endpoint=self.endpoint)
        for wait in (*_WAITS, None):
            try:
                timeout = constants.HF_HUB_ETAG_TIMEOUT
                info = api.model_info(self.repo_id, revision=self.revision, files_metadata=True, timeout=timeout)
                commit, siblings = str(info.sha), info.siblings
                break
            except (HTTPError, OSError) as error:
                if wait is None or not is_passing(error):
                    raise self._explained(error) from None
                time.sleep(wait)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise self._strange() from None
        if not _COMMIT.fullmatch(commit) or siblings is None:
            raise self._strange()
        return commit, {
            item.rfilename: _Listed(
                item.lfs.size if item.lfs else item.size,
                item.lfs.sha256 if item.lfs else "",
                "" if item.lfs else item.blob_id or "",
            )
            for item in siblings
        }

    def _download(self, name: str, commit: str, expected: _Listed) -> None:
        """Put one file into the snapshot, or leave none behind.

        Raises:
            UserError: RG503 if what came differs from the list; else as `fetch`.
        """
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, FileMetadataError, HTTPError

        place = self.folder / "snapshots" / commit / name
        if place.exists():
            if expected.size in (None, place.stat().st_size):
                return
            _discard(place)  # cut short or overwritten by something else
        try:
            got = hf_hub_download(
                self.repo_id,
                name,
                revision=commit,
                endpoint=self.endpoint,
                cache_dir=self.cache,
                etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (HTTPError, OSError, EntryNotFoundError, FileMetadataError, RuntimeError) as error:
            raise self._explained(error, name) from None
        why = "belongs to another commit" if Path(got) != place else _difference(place, expected)
        if why:
            _discard(Path(got))
            what = f"the download of {name} {why}"
            raise UserError("RG503", what, where=self.where, fix="run again; it was removed from the cache")

    def _check_disk(self, snapshot: Path, names: Sequence[str], files: Mapping[str, _Listed]) -> None:
        """Raise RG402 if what is still to be downloaded does not fit."""
        need = sum(files[name].size or 0 for name in names if not (snapshot / name).exists())
        there = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if need > free:
            what = f"{need / 1e9:.2f} GB are to be downloaded, and {free / 1e9:.2f} GB are free"
            fix = "make room, or set HF_HOME to a folder on another disk"
            raise UserError("RG402", what, where=str(self.cache), fix=fix)

    def _resolved(self) -> str:
        """The commit that the cache has for the revision, "" if none."""
        path = self.folder / "refs" / self.revision
        inside = path.resolve().is_relative_to((self.folder / "refs").resolve())
        return path.read_text().strip() if inside and path.is_file() else ""

    def _remember(self, commit: str) -> None:
        """Note for offline use what the revision means; only after all files are there."""
        path = self.folder / "refs" / self.revision
        if _COMMIT.fullmatch(self.revision) or ".." in self.revision or self._resolved() == commit:
            return
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        with suppress(OSError):  # only later offline runs need it, and a shared cache may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(commit)
            fresh.replace(path)

    def _explained(self, error: Exception, name: str = "") -> UserError:
        known = explained(error, self.repo_id, self.revision, name, str(self.cache), self.endpoint)
        if known.code != "RG501":
            return known
        try:
            self.cached()
        except UserError:
            return known
        fix = f"{known.fix}, or run offline (HF_HUB_OFFLINE=1): the local cache has a copy"
        return UserError(known.code, known.what, where=known.where, fix=fix)

    def _strange(self) -> UserError:
        what = "the answer to the request for a list of files is not that of a Hub"
        fix = "check HF_ENDPOINT, and whether a proxy or a log-in page stands in between"
        return UserError("RG501", what, where=self.where, fix=fix)

    def _missing(self, what: str) -> UserError:
        fix = "run once with a connection and without --offline or HF_HUB_OFFLINE, or name a local folder"
        return UserError("RG501", what, where=f"{self.where}, cache {self.cache}", fix=fix)


def _named_weights(snapshot: Path) -> str:
    """The file of weights that config.json asks for, "" if it does not."""
    path = snapshot / "config.json"
    named = read_json(path).get("transformers_weights") if path.is_file() else ""
    return named if isinstance(named, str) else ""


def _difference(path: Path, expected: _Listed) -> str:
    """How a file differs from what the Hub lists, "" if it does not."""
    size = path.stat().st_size
    if expected.size not in (None, size):
        return f"has {size} bytes instead of {expected.size}"
    if expected.sha256:
        sha, wanted = hashlib.sha256(), expected.sha256
    elif expected.git_sha1:
        sha, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), expected.git_sha1
    else:
        return ""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return "" if sha.hexdigest() == wanted else "does not have the hash that the Hub lists"


def _discard(path: Path) -> None:
    """Remove a file from a snapshot, with the blob that it links to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars unless a person watches, and no log lines: they repeat errors, with signed addresses in them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    log = logging.getLogger("huggingface_hub")
    level, off = log.level, are_progress_bars_disabled() or sys.stderr.isatty()
    log.setLevel(logging.CRITICAL)
    if not off:
        disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not off:
            enable_progress_bars()
