"""What the result of a run depends on beside the content of its inputs and its options, for journals.

Content keys and digests cover contents. Two runs of one key may still differ by versions, by this package's own files,
and by where the inputs are: a file that was exchanged for another of equal size and time is noticed by its inode.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from regraft.checkpoint.lineage import FILE_NAME, Lineage, Software
from regraft.checkpoint.model import Checkpoint
from regraft.checkpoint.output import clear_leftovers
from regraft.errors import UserError, UserWarningMessage

# What compiles and runs the arithmetic, beside what the lineage names.
_KERNELS = ("numpy", "numba")


def run_key(facts: Mapping[str, Any]) -> str:
    """A content key from JSON-able facts: equal keys mean equal results."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def done_before(out: Path, key: str) -> Lineage | None:
    """The lineage of an output that a run of this key has made, said to be up to date; None if it is not there."""
    if not (out / FILE_NAME).is_file():
        return None
    try:
        lineage = Lineage.read(out)
    except UserError:
        return None  # whatever it is, it is not ours
    if not key or lineage.key != key:
        return None
    settle_up_to_date(out)
    return lineage


def settle_up_to_date(out: Path) -> None:
    """Remove what runs that died have left beside an output that is as wanted, and say that there is nothing to do."""
    clear_leftovers(out)
    warnings.warn(f"{out} is up to date", UserWarningMessage, stacklevel=2)


def surroundings(checkpoints: Iterable[Checkpoint]) -> dict[str, Any]:
    """JSON-able facts that are equal for two runs that may share their work.

    Raises:
        UserError: RG101 if a file of a model has gone.
    """
    files = [state for checkpoint in {id(c): c for c in checkpoints}.values() for state in _states(checkpoint)]
    return {
        "software": [Software().model_dump(mode="json"), *map(metadata.version, _KERNELS), _code()],
        "files": hashlib.blake2b(json.dumps(files).encode(), digest_size=16).hexdigest(),
    }


def _code() -> str:
    """What names the state of this package's own files, which change without a version while somebody works on them."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    states = [[str(file), status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]]
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=16).hexdigest()


def _states(checkpoint: Checkpoint) -> list[list[Any]]:
    """[path, size, time, device, inode] of the files of a model; those of adapters and deltas are in its digest."""
    states = []
    for stamp in checkpoint.stamps:
        if not stamp.startswith("+"):
            path = checkpoint.path / stamp.rsplit(" ", 2)[0]
            try:
                status = path.stat()
            except OSError as error:
                what, fix = f"the file cannot be read: {error.strerror}", "run again with it in place"
                raise UserError("RG101", what, where=str(path), fix=fix) from error
            states.append([str(path), status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino])
    return states
