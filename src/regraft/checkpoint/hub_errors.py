"""What went wrong between here and the Hub, in one sentence.

The texts of huggingface_hub's own exceptions are not passed on: they hold addresses, which may be signed, and several
lines of advice for other programs. The kind of the exception and the HTTP status say enough.
"""

from __future__ import annotations

import errno
from urllib.parse import urlsplit

from regraft.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = (408, 429, 500, 502, 503, 504)


def is_passing(error: Exception) -> bool:
    """Whether it makes sense to try the same request again."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return _status(error) in _PASSING
    return not isinstance(error, OfflineModeIsEnabled)


def explained(error: BaseException, repo_id: str, revision: str, file: str, cache: str, endpoint: str) -> UserError:
    """The error that a user sees.

    Args:
        error: what huggingface_hub, its HTTP library or the file system raised.
        repo_id, revision, file: what was asked for; `file` is "" for the list of files.
        cache, endpoint: where it was to go, and where it was to come from.
    """
    from huggingface_hub import errors as hub

    where = f"{repo_id}@{revision}" + (f", {file}" if file else "")
    host = urlsplit(endpoint).hostname or "the Hub"
    cause = error.__cause__
    if isinstance(error, hub.LocalEntryNotFoundError) and cause is not None:
        return explained(cause, repo_id, revision, file, cache, endpoint)
    if isinstance(error, hub.GatedRepoError):
        fix = f"accept its terms at {_page(endpoint, repo_id)}, and log in with `hf auth login`"
        return UserError("RG502", f"{repo_id} is gated", where=where, fix=fix)
    if isinstance(error, hub.RevisionNotFoundError):
        fix = "check the part after the @, or leave it out"
        return UserError("RG502", f"{repo_id} has no revision {revision!r}", where=where, fix=fix)
    if isinstance(error, hub.EntryNotFoundError) and file:
        what = f"{host} lists {file} and then says that there is no such file"
        return UserError("RG503", what, where=where, fix="run again")
    if isinstance(error, hub.HfHubHTTPError):
        return _by_status(_status(error), repo_id, where, host)
    if isinstance(error, hub.FileMetadataError):
        fix = "check HF_ENDPOINT, and whether a proxy stands in between"
        return UserError("RG501", f"the answer of {host} is not that of a Hub", where=where, fix=fix)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return UserError("RG501", "the run is offline", where=where, fix="unset HF_HUB_OFFLINE")
    if isinstance(error, hub.HTTPError):
        # `_request` because the property raises where there is none
        asked = getattr(getattr(error, "_request", None), "method", "")
        return _by_kind(type(error).__name__, where, host, file if asked == "GET" else "")
    if isinstance(error, OSError) and error.errno in _FULL:
        fix = "make room, or set HF_HOME to a folder on another disk"
        return UserError("RG402", f"the disk is full while downloading {file or repo_id}", where=cache, fix=fix)
    if isinstance(error, OSError) and error.errno is not None:
        fix = "check its permissions, or set HF_HOME to another folder"
        return UserError("RG405", f"the Hub's cache cannot be used: {error.strerror}", where=cache, fix=fix)
    what = f"the download of {file or repo_id} broke off or has the wrong size"
    return UserError("RG503", what, where=where, fix="run again; nothing of it was kept")


def _by_status(status: int, repo_id: str, where: str, host: str) -> UserError:
    if status in (401, 404):
        fix = "check the id, and for a private model log in with `hf auth login`"
        return UserError("RG502", f"{repo_id} is not on the Hub, or is private", where=where, fix=fix)
    if status in (403, 451):
        fix = "log in with `hf auth login` as someone who may read it"
        return UserError("RG502", f"{host} refuses access to {repo_id} (HTTP {status})", where=where, fix=fix)
    reason = "too many requests" if status == 429 else f"HTTP {status}"
    return UserError("RG501", f"{host} cannot answer now ({reason})", where=where, fix="run again later")


def _by_kind(kind: str, where: str, host: str, file: str) -> UserError:
    if file and kind in ("RemoteProtocolError", "ReadError", "DecodingError"):
        what = f"the download of {file} broke off"
        return UserError("RG503", what, where=where, fix="run again; nothing of it was kept")
    if "Timeout" in kind:
        return UserError(
            "RG501", f"{host} did not answer in time", where=where, fix="check the connection and run again"
        )
    fix = "check the connection, the proxy settings and HF_ENDPOINT"
    return UserError("RG501", f"{host} cannot be reached ({kind})", where=where, fix=fix)


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    return int(getattr(response, "status_code", 0))


def _page(endpoint: str, repo_id: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.hostname}/{repo_id}"
