"""What the result of a run depends on beside the content of its inputs and its options, for journals.

Content keys and digests cover contents. Two runs of one key may still differ by versions, by this package's own files,
and by where the inputs are: a file that was exchanged for another of equal size and time is noticed by its inode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from regraft.checkpoint.lineage import Software
from regraft.checkpoint.model import Checkpoint
from regraft.errors import UserError

# What compiles and runs the arithmetic, beside what the lineage names.
_KERNELS = ("numpy", "numba")


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
