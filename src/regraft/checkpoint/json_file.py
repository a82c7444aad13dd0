"""Reading the JSON files of a model: bounded in size, typed at the top, every failure one sentence.

What is read is walked later by recursion, copied, and computed with, so its depth and the length of its integers are
bounded here too: the limits of Python's own parser are those of its stack, and an integer of 400 digits is no float.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.paths import head, regular_size
from regraft.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

# Real configs have kilobytes, indices and tokenizers up to 40 megabytes.
LIMIT = 64 * 10**6
MAX_VALUES = 5 * 10**6  # the largest tokenizers have half as many; each costs some 60 bytes of memory
MAX_DEPTH = 100
MAX_DIGITS = 40  # transformers writes 10^30 where it means infinity


def read_json(path: Path, kind: type = dict, *, limit: int = LIMIT) -> Any:
    """The content of a JSON file.

    Args:
        path: a regular file.
        kind: the Python type that the top level must have.
        limit: most bytes that are read.

    Raises:
        UserError: RG105 if the file is missing, too large, no JSON in UTF-8, nested too deeply or of another type;
            RG106 if it is a stub of git-LFS.

    Nested too deeply are more than `MAX_DEPTH` levels; integers of more than `MAX_DIGITS` digits and files of more than
    `MAX_VALUES` values are refused as well.
    """
    try:
        size = regular_size(path)
        if size > limit:
            raise _refused(path, f"it has {size} bytes and at most {limit} are read")
        head(path)
        value = parse_json(path.read_bytes())
    except UserError as error:
        if error.code != "RG101":
            raise
        raise _refused(path, error.what) from None
    except UnicodeDecodeError as error:
        raise _refused(path, f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _refused(path, f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise _refused(path, _unfit(error)) from None
    except OSError as error:
        raise _refused(path, str(error.strerror)) from None
    if not isinstance(value, kind):
        raise _refused(path, f"its top level is {type(value).__name__} instead of {kind.__name__}")
    return value


def parse_json(text: bytes, **hooks: Any) -> Any:
    """JSON in UTF-8, within the bounds of this module; `hooks` are those of `json.loads`.

    Raises:
        UnicodeDecodeError, json.JSONDecodeError: it is no text, or no JSON.
        RecursionError: it is nested too deeply.
        ValueError: it holds too much, or a number that is too long.
    """
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    value = json.loads(text.decode("utf-8"), parse_int=_integer, **hooks)
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, (dict, list))
        ]
        if not level:
            return value
    raise RecursionError


def malformed_field(error: ValidationError) -> str:
    """The first field that does not fit the model it was read for, and why, as words for a user."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return f"{field} is malformed: {first['msg'][0].lower()}{first['msg'][1:]}"


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("it has a number that is too long")
    return int(text)


def _unfit(error: RecursionError | ValueError) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _refused(path: Path, why: str) -> UserError:
    fix = "restore the file from where the model came from"
    return UserError("RG105", f"{path.name} cannot be used: {why}", where=str(path), fix=fix)
