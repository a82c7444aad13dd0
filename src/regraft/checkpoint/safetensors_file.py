"""Reading a safetensors file that may lie: the whole header is checked before a byte of data is trusted.

A file is 8 bytes of header length, a JSON header, then the data. Accepted are unique names (the format demands them,
its own library does not check), known dtypes, sizes that follow from dtype and shape, and ranges that cover the data
from the first byte to the last with no gap and no overlap. A tensor is then a file, an offset, a dtype and a shape;
slices of it are read on demand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regraft.checkpoint.descriptors import DataFile
from regraft.checkpoint.dtypes import DTYPES, array_dtype, as_tensor, item_size
from regraft.checkpoint.json_file import parse_json
from regraft.checkpoint.paths import head, shown
from regraft.checkpoint.tensor import TensorSource
from regraft.errors import UserError

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the format's own limit
MAX_NAME = 1000  # characters; paths of parameters have some dozens, and are taken apart by patterns later
_MAX_BYTES = 2**63 - 1
# Known to the format, but values of less than a byte, bare scales, or encodings that cannot be merged.
_UNSUPPORTED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_MISTAKEN = {
    b"PK\x03\x04": "a zip archive, perhaps a pickled .bin or .pt file",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"<": "a web page",
}


class FileTensor:
    """One tensor of a safetensors file: a range of bytes that is read in slices, by any number of threads."""

    bare = True
    __slots__ = ("_begin", "_file", "_numel", "name", "shape", "stored")

    def __init__(self, name: str, shape: tuple[int, ...], stored: str, file: DataFile, begin: int) -> None:
        self.name, self.shape, self.stored = name, shape, stored
        self._file, self._begin = file, begin
        self._numel = _product(shape)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored]

    @property
    def path(self) -> Path:
        """The file that holds the tensor."""
        return self._file.path

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements `[start, stop)` in row-major order, in memory of their own; indices behave as in slicing.

        Raises:
            UserError: RG101 or RG103 if the file has gone or changed since it was opened.
        """
        start, stop, _ = slice(start, stop).indices(self._numel)
        size = item_size(self.stored)
        nbytes = max(stop - start, 0) * size
        values = self._file.read(self._begin + start * size, nbytes, self._what)
        return as_tensor(values.view(array_dtype(self.stored)), self.stored)

    def read_into(self, out: Any, start: int) -> None:
        """Fill `out`, a flat and contiguous array of `array_dtype(stored)`, with the elements from `start` on.

        All of them must exist.

        Raises:
            UserError: as `read`.
        """
        self._file.read_into(out.view(np.uint8), self._begin + start * item_size(self.stored), self._what)

    def _what(self) -> str:
        return f"tensor {shown(self.name)}"

    def __repr__(self) -> str:
        return f"FileTensor({self.name!r}, {self.shape}, {self.stored})"


def read_safetensors(path: Path) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """The tensors of a file in the order in which they are stored, and its `__metadata__`. Reads the header only.

    Raises:
        UserError: RG101 (missing), RG103 (damaged; names the file and the tensor), RG106 (git-LFS stub), RG109 (a
            dtype of packed weights).
    """
    first = head(path, 9)
    file = DataFile(path)
    begin = 8 + int.from_bytes(first[:8], "little")
    if len(first) < 9 or first[8:] != b"{":
        raise _damaged(path, _mistaken(first))
    if begin - 8 > MAX_HEADER:
        raise _damaged(path, f"its header claims {begin - 8} bytes, more than the {MAX_HEADER} that the format allows")
    if begin > file.size:
        raise _damaged(path, f"its header claims {begin - 8} bytes but the file has {file.size}")
    header = _parse(path, file.read(8, begin - 8, lambda: "the header").tobytes())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is no mapping of texts")
    entries = sorted((_entry(path, name, given) for name, given in header.items()), key=lambda e: (e[0], e[1]))
    _check_cover(path, entries, file.size - begin)
    tensors: dict[str, TensorSource] = {
        name: FileTensor(name, shape, dtype, file, begin + at) for at, _, name, shape, dtype in entries
    }
    return tensors, metadata


_Entry = tuple[int, int, str, tuple[int, ...], str]


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _damaged(path, f"its header has {shown(twice)} twice")
        return result

    def constant(word: str) -> None:
        raise _damaged(path, f"its header has the number {word}")

    try:
        header = parse_json(text, object_pairs_hook=unique, parse_constant=constant)
        for name in header:
            name.encode()
            if len(name) > MAX_NAME:
                raise _damaged(path, f"the name {shown(name, 40)} has {len(name)} characters")
    except UnicodeDecodeError as error:
        raise _damaged(path, f"its header is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _damaged(path, f"the name {shown(name)} is no valid text") from None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"its header is no JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _damaged(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, f"its header cannot be used: {error}") from None
    return header  # type: ignore[no-any-return]


def _entry(path: Path, name: str, given: Any) -> _Entry:
    """One checked entry: begin, end, name, shape, dtype."""
    where = f"tensor {shown(name)}"
    if not isinstance(given, dict) or not given.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if dtype in _UNSUPPORTED:
            fix = "use a version of the model in BF16, F16 or F32"
            raise UserError("RG109", f"{where} has the dtype {dtype}", where=str(path), fix=fix)
        raise _damaged(path, f"{where} has the unknown dtype {shown(dtype)}")
    if not _sizes(shape):
        raise _damaged(path, f"{where} has the shape {shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{where} has the data_offsets {shown(offsets)}")
    count = _product(shape)
    size = item_size(dtype)
    if count < 0 or count * size > _MAX_BYTES:
        raise _damaged(path, f"{where} has the shape {shown(shape)}, which no file can hold")
    if count * size != offsets[1] - offsets[0]:
        what = (
            f"{where} has {offsets[1] - offsets[0]} bytes where {count * size} follow from {dtype} and {shown(shape)}"
        )
        raise _damaged(path, what)
    return offsets[0], offsets[1], name, tuple(shape), dtype


def _sizes(values: Any) -> bool:
    """Whether this is a list of integers (no bool, no float) from 0 to 2^63 - 1."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= _MAX_BYTES for v in values)


def _product(shape: tuple[int, ...] | list[int]) -> int:
    """Number of elements, or -1 as soon as a partial product exceeds what a file can hold."""
    n = 1
    for size in shape:
        n *= size
        if n > _MAX_BYTES:
            return -1
    return n


def _check_cover(path: Path, entries: list[_Entry], size: int) -> None:
    """Refuse gaps and overlaps: in order of their ranges, each tensor begins where the one before ends."""
    end, before = 0, ""
    for start, stop, name, _, _ in entries:
        if start > size or stop > size:
            what = f"tensor {shown(name)} ends at byte {stop} of the data, which have {size}: the file is cut short"
            raise _damaged(path, what)
        if start < end:
            raise _damaged(path, f"tensor {shown(name)} overlaps tensor {shown(before)}")
        if start > end:
            raise _damaged(path, f"{start - end} bytes before tensor {shown(name)} belong to no tensor")
        end, before = stop, name
    if end != size:
        raise _damaged(path, f"{size - end} bytes after the last tensor belong to no tensor")


def _mistaken(first: bytes) -> str:
    for start, what in _MISTAKEN.items():
        if first.startswith(start):
            return f"it begins like {what}"
    return "it has no header" if len(first) < 9 else "its header does not begin with '{'"


def _damaged(path: Path, what: str) -> UserError:
    return UserError("RG103", f"{path.name} is damaged: {what}", where=str(path), fix="copy or download it again")
