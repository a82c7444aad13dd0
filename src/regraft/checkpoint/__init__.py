"""Models on disk: opened lazily, read in slices, written in place and published whole. Layout: DESIGN in docs/.

Names are imported when they are first used, so that `import regraft.checkpoint` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.checkpoint.dtypes import DTYPES
    from regraft.checkpoint.json_file import read_json
    from regraft.checkpoint.model import Checkpoint, open_checkpoint
    from regraft.checkpoint.paths import Ref, parse_ref
    from regraft.checkpoint.pickle_file import read_pickle
    from regraft.checkpoint.safetensors_file import read_safetensors
    from regraft.checkpoint.tensor import BLOCK, MemoryTensor, TensorSource, nbytes, numel
    from regraft.checkpoint.writer import ModelWriter, TensorSpec, size_on_disk

_HOME = {
    "BLOCK": "tensor",
    "Checkpoint": "model",
    "DTYPES": "dtypes",
    "MemoryTensor": "tensor",
    "ModelWriter": "writer",
    "Ref": "paths",
    "TensorSource": "tensor",
    "TensorSpec": "writer",
    "nbytes": "tensor",
    "numel": "tensor",
    "open_checkpoint": "model",
    "parse_ref": "paths",
    "read_json": "json_file",
    "read_pickle": "pickle_file",
    "read_safetensors": "safetensors_file",
    "size_on_disk": "writer",
}

__all__ = [
    "BLOCK",
    "DTYPES",
    "Checkpoint",
    "MemoryTensor",
    "ModelWriter",
    "Ref",
    "TensorSource",
    "TensorSpec",
    "nbytes",
    "numel",
    "open_checkpoint",
    "parse_ref",
    "read_json",
    "read_pickle",
    "read_safetensors",
    "size_on_disk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
