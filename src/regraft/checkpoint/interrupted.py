"""A run that ends early: whether the same command may succeed later, and the sentence that says where it goes on."""

from __future__ import annotations

from pathlib import Path

from regraft.checkpoint.output import DISK_FULL
from regraft.errors import UserError

_GOES_ON = "and the same command goes on from there"


def may_pass(error: BaseException) -> bool:
    """Whether the next run may succeed with the same input: it was stopped, a read failed, or a name was taken.

    Not so if the disk is full: what is kept would keep it full.
    """
    if isinstance(error, KeyboardInterrupt):
        return True
    if not isinstance(error, UserError):
        return False
    cause = error.__cause__
    while isinstance(cause, UserError):
        cause = cause.__cause__
    return error.code == "RG401" or (isinstance(cause, OSError) and cause.errno not in DISK_FULL)


def kept(error: BaseException, what: str, staging: Path) -> BaseException:
    """The error with a hint that so much is kept in a staging folder; as it is if an inner folder has said so."""
    if isinstance(error, UserError):
        if _GOES_ON in error.fix:
            return error
        hint = f"{what} are kept in {staging}, {_GOES_ON}"
        return UserError(error.code, error.what, where=error.where, fix="; ".join(filter(None, [error.fix, hint])))
    return KeyboardInterrupt(f"{what} are kept in {staging}, {_GOES_ON}")
