"""Reading pickled weights (`pytorch_model.bin`, `.pt`, `.pth`) without running anything that the file says.

`torch.load(weights_only=True)` builds tensors and plain containers and refuses every other global; what it refuses is
refused here, and what would cost it any amount of memory or time is refused before (see `pickle_check`). Zip files are
mapped, so a slice costs a slice; files in the format from before PyTorch 1.6 are read as a whole. The trade-off of a
map: a file that is cut short while a slice is being copied would kill the process, so its state is compared before each
slice, which leaves only the moment of the copy. Safetensors files do not have this gap.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.dtypes import is_storable
from regraft.checkpoint.paths import head, shown
from regraft.checkpoint.pickle_check import NotAllowed, check_pickles
from regraft.checkpoint.safetensors_file import MAX_NAME
from regraft.checkpoint.tensor import TensorSource
from regraft.errors import UserError

# Where training scripts keep the weights beside an optimiser's state.
_NESTED = ("state_dict", "model_state_dict", "model", "module")
# What the unpickler and the tensor builders raise for bytes that no `torch.save` wrote.
_BROKEN = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    MemoryError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


class PickledTensor:
    """One tensor of a pickled file, strided in any way, behind the contract of flat slices."""

    __slots__ = ("_path", "_state", "_tensor", "dtype", "name", "shape")

    def __init__(self, name: str, tensor: torch.Tensor, path: Path, state: tuple[int, int] | None) -> None:
        self.name, self.shape, self.dtype = name, tuple(tensor.shape), tensor.dtype
        self._tensor, self._path, self._state = tensor, path, state

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `[start, stop)` in row-major order, in memory of their own; indices behave as in slicing.

        Raises:
            UserError: RG101 or RG103 if the file has gone or changed since it was opened.
        """
        if self._state is not None and _state(self._path) != self._state:
            fix = "run again when nothing else writes to it"
            raise UserError("RG103", "the file was changed after it was opened", where=str(self._path), fix=fix)
        start, stop, _ = slice(start, stop).indices(self._tensor.numel())
        if stop <= start:
            return torch.empty(0, dtype=self.dtype)
        rows = self._tensor.reshape(1) if not self.shape else self._tensor
        width = self._tensor.numel() // rows.shape[0]
        first, last = start // width, -(-stop // width)
        return rows[first:last].reshape(-1)[start - first * width : stop - first * width].clone()

    def __repr__(self) -> str:
        return f"PickledTensor({self.name!r}, {self.shape}, {self.dtype})"


def read_pickle(path: Path) -> dict[str, TensorSource]:
    """The tensors of a pickled state dict, in its order.

    Names that share storage, offset and strides (tied weights) map to one and the same source, whose `name` is the
    first of them. A training checkpoint is accepted if its weights are a dict of tensors under `state_dict`,
    `model_state_dict`, `model` or `module`.

    Raises:
        UserError: RG101 (missing), RG106 (git-LFS stub), RG107 (needs code, or holds more than tensors), RG109
            (quantised, sparse or of a dtype that safetensors lacks), RG111 (damaged).
    """
    zipped = head(path, 4) == b"PK\x03\x04"
    state = _state(path) if zipped else None
    sources: dict[str, TensorSource] = {}
    known: dict[tuple[Any, ...], TensorSource] = {}
    size = path.stat().st_size
    for name, tensor in _state_dict(_load(path, zipped), path).items():
        _check(name, tensor, path, size)
        tensor = tensor.detach()
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        source = PickledTensor(name, tensor, path, state)
        sources[name] = known.setdefault(place, source) if tensor.numel() else source
    return sources


def _load(path: Path, zipped: bool) -> Any:
    try:
        check_pickles(path, zipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is in the messages below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except NotAllowed as refusal:
        raise _unsafe(path, str(refusal)) from None
    except (pickle.UnpicklingError, *_BROKEN) as error:
        text = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", text)
        if refused or (isinstance(error, pickle.UnpicklingError) and "nsupported" in text):
            raise _unsafe(path, _needs(text, refused)) from None
        reason = shown((text.strip() or type(error).__name__).splitlines()[0], 160)
        what = f"{path.name} is damaged or was not written by torch.save ({reason})"
        raise UserError("RG111", what, where=str(path), fix="copy or download it again") from None


def _needs(text: str, refused: re.Match[str] | None) -> str:
    if refused is None:
        line = next(line for line in text.splitlines() if "nsupported" in line)
        return f"more than tensors ({shown(line.strip())})"
    return refused[1] or "TorchScript"


def _unsafe(path: Path, needed: str) -> UserError:
    what = f"{path.name} needs {shown(needed, 160)[1:-1]} to load, and code from a model is never run"
    fix = "use a safetensors version of the model, or save its state dict alone with torch.save"
    return UserError("RG107", what, where=str(path), fix=fix)


def _state_dict(loaded: Any, path: Path) -> Mapping[str, torch.Tensor]:
    """The mapping of names to tensors in what was loaded."""
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[key] for key in _NESTED if key in loaded]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(_is_weight(*item) for item in candidate.items()):
            return candidate
    fix = "save the model's state dict alone with torch.save"
    if not isinstance(loaded, Mapping):
        what = f"{path.name} holds a {type(loaded).__name__} and not a dict of tensors"
    elif not loaded:
        what = f"{path.name} holds no tensors"
    else:
        key, value = next(item for item in loaded.items() if not _is_weight(*item))
        what = f"{path.name} holds more than tensors: {shown(key)} is a {type(value).__name__}"
    raise UserError("RG107", what, where=str(path), fix=fix)


def _is_weight(key: object, value: object) -> bool:
    """Whether this is a tensor under a name that can be written down: pickles allow halves of characters."""
    return isinstance(key, str) and key.encode(errors="ignore").decode() == key and isinstance(value, torch.Tensor)


def _check(name: str, tensor: torch.Tensor, path: Path, size: int) -> None:
    if len(name) > MAX_NAME or name == "__metadata__":
        what = f"tensor {shown(name, 40)} has a name that cannot be stored"
        raise UserError("RG111", what, where=str(path), fix="rename it and save the state dict again")
    kind = ""
    if tensor.is_quantized or not is_storable(tensor.dtype):
        kind = f"the dtype {tensor.dtype}"
    elif tensor.layout != torch.strided or tensor.is_nested:
        kind = "a sparse or nested layout"
    elif tensor.device.type != "cpu":
        kind = "no data"  # a tensor on the meta device
    if kind:
        fix = "use a version of the model with dense float weights"
        raise UserError("RG109", f"tensor {shown(name)} has {kind}", where=str(path), fix=fix)
    if tensor.numel() * tensor.dtype.itemsize > size:  # strides of 0 repeat a few values any number of times
        what = f"tensor {shown(name)} of shape {tuple(tensor.shape)} is larger than the file"
        raise UserError("RG111", what, where=str(path), fix="copy or download it again")


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        what, fix = f"the file cannot be read: {error.strerror}", "run again with it in place"
        raise UserError("RG101", what, where=str(path), fix=fix) from None
    return status.st_size, status.st_mtime_ns
