"""Reading the JSON files of a model: bounded in size, typed at the top, every failure one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.checkpoint.paths import head, regular_size
from regraft.errors import UserError

# Real configs have kilobytes, indices and tokenizers megabytes.
LIMIT = 200 * 10**6


def read_json(path: Path, kind: type = dict, *, limit: int = LIMIT) -> Any:
    """The content of a JSON file.

    Args:
        path: a regular file.
        kind: the Python type that the top level must have.
        limit: most bytes that are read.

    Raises:
        UserError: RG105 if the file is missing, too large, no JSON in UTF-8, nested too deeply or of another type;
            RG106 if it is a stub of git-LFS.
    """
    try:
        size = regular_size(path)
        if size > limit:
            raise _refused(path, f"it has {size} bytes and at most {limit} are read")
        head(path)
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UserError as error:
        if error.code != "RG101":
            raise
        raise _refused(path, error.what) from None
    except UnicodeDecodeError as error:
        raise _refused(path, f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _refused(path, f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError):
        raise _refused(path, "it is nested too deeply or has a number that is too long") from None
    except OSError as error:
        raise _refused(path, str(error.strerror)) from None
    if not isinstance(value, kind):
        raise _refused(path, f"its top level is {type(value).__name__} instead of {kind.__name__}")
    return value


def _refused(path: Path, why: str) -> UserError:
    fix = "restore the file from where the model came from"
    return UserError("RG105", f"{path.name} cannot be used: {why}", where=str(path), fix=fix)
