"""A look at a pickle before any unpickler sees it: which names it asks for, and what it would build.

`torch.load(weights_only=True)` runs none of a file's code, but it lets a file make objects as large as it likes
(`bytearray(n)`, `torch.Tensor(n)`, text that is encoded over and over), and builds, compares and prints whatever is in
it: a few dozen tuples, each holding the one before twice, take longer to hash or to print than anyone can wait. So the
opcodes are followed here first, with the kinds of the values in place of the values, and everything is refused that
`torch.save` does not write for a dict of tensors.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# What the pickle of a state dict, or of a training checkpoint around it, may name.
_TENSORS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
)
_CLASSES = ("torch.nn.parameter.Parameter", "torch.Size", "torch.device", "torch.serialization._get_layout")
_DTYPES = """float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu
float4_e2m1fn_x2 complex32 complex64 complex128 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool qint8 quint8
qint32 quint4x2 quint2x4 bits8 bits16 bits1x8 bits2x4 bits4x2 per_tensor_affine per_tensor_symmetric
per_channel_affine per_channel_symmetric per_channel_affine_float_qparams"""
_STORAGES = """Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexDouble ComplexFloat QInt8 QInt32 QUInt8
QUInt4x2 QUInt2x4 Untyped Typed"""
_EMPTY_ONLY = "collections.OrderedDict"  # filled by later opcodes, whose keys are looked at
ALLOWED = {
    _EMPTY_ONLY,
    *_CLASSES,
    *(f"torch._utils.{name}" for name in _TENSORS),
    *(f"torch.{name}" for name in _DTYPES.split()),
    *(f"torch{module}.{name}Storage" for name in _STORAGES.split() for module in ("", ".storage")),
}
MAX_PICKLE = 32 * 10**6  # bytes; some 100 for each tensor
_SCALARS = {"int", "long", "int_or_bool", "bool", "float", "bytes", "bytes_or_str", "str", "None"}
# Kinds of values. A flat tuple has scalars and names in it alone, so that it is as long as it looks.
_MARK, _SCALAR, _NAME, _EMPTY, _FLAT, _OTHER = "mark", "scalar", "name", "empty tuple", "flat tuple", "other"


class NotAllowed(Exception):
    """The pickle asks for more than tensors; the text names what."""


def check_pickles(path: Path, zipped: bool) -> None:
    """Follow the pickles of a file that `torch.save` may have written.

    Args:
        path: a regular file.
        zipped: it is a zip archive, of today's format; else the format from before PyTorch 1.6, of several pickles.

    Raises:
        NotAllowed: it asks for a global that tensors do not need, or builds what no state dict has.
        ValueError, zipfile.BadZipFile, OSError: it is damaged, compressed, or too long.
    """
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("its archive is compressed, which torch.save never does")
            for record in archive.infolist():
                if record.filename.endswith("data.pkl"):
                    with archive.open(record) as content:
                        _follow(_Bounded(content, record.file_size))
        return
    with path.open("rb") as file:
        stream = _Bounded(file, path.stat().st_size)
        for _ in range(5):  # magic number, version, facts of the machine, the object, the keys of its storages
            _follow(stream)


class _Bounded:
    """A stream that never makes a buffer larger than what is left in it."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, min(size, MAX_PICKLE)

    def read(self, size: int) -> bytes:
        return self._taken(self._stream.read(max(min(size, self._left), 0)))

    def readline(self) -> bytes:
        return self._taken(self._stream.readline(self._left))

    def _taken(self, content: bytes) -> bytes:
        self._left -= len(content)
        return content


def _follow(stream: _Bounded) -> None:
    """One pickle, to its end."""
    stack: list[str] = []
    names: list[str] = []  # of the globals, in the order in which they were named
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            name = opcode.name
            if name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(argument)] = stack[-1]  # type: ignore[arg-type]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])  # type: ignore[arg-type]
            elif name == "MARK":
                stack.append(_MARK)
            elif name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
                if names[-1] not in ALLOWED:
                    raise NotAllowed(names[-1])
                stack.append(f"{_NAME} {names[-1]}")
            else:
                below = _popped(stack, opcode)
                _check(name, below)
                stack += _pushed(opcode, below)
    except (IndexError, KeyError):
        raise ValueError("its pickle takes what it never made") from None


def _popped(stack: list[str], opcode: pickletools.OpcodeInfo) -> list[str]:
    """What an opcode takes off the stack, the lowest first; what is above a mark without the mark."""
    before = opcode.stack_before
    taken: list[str] = []
    fixed = len(before)
    if pickletools.markobject in before:
        while (top := stack.pop()) != _MARK:
            taken.append(top)
        fixed = before.index(pickletools.markobject)
    for _ in range(fixed):
        taken.append(stack.pop())
    if _MARK in taken:
        raise IndexError
    return taken[::-1]


def _check(name: str, below: list[str]) -> None:
    if name in ("REDUCE", "NEWOBJ"):
        if not below[0].startswith(_NAME) or (below[0] == f"{_NAME} {_EMPTY_ONLY}" and below[1] != _EMPTY):
            raise NotAllowed("a call of something that it makes itself")
    elif name in ("SETITEM", "SETITEMS", "DICT"):
        if any(key != _SCALAR for key in below[name != "DICT" :: 2]):
            raise NotAllowed("a dict with keys that are no texts")
    elif name == "BINPERSID" and below[0] != _FLAT:
        raise NotAllowed("a storage of unknown kind")
    elif name in (
        "STACK_GLOBAL",
        "MEMOIZE",
        "INST",
        "OBJ",
        "NEWOBJ_EX",
        "EXT1",
        "EXT2",
        "EXT4",
        "PERSID",
        "FROZENSET",
        "ADDITEMS",
    ):
        raise NotAllowed(f"the unsupported operand {name}")


def _pushed(opcode: pickletools.OpcodeInfo, below: list[str]) -> Iterator[str]:
    """The kinds of what an opcode leaves."""
    if opcode.name == "DUP":
        yield from (below[0], below[0])
        return
    for kind in opcode.stack_after:
        if kind.name == "tuple":
            flat = all(one == _SCALAR or one.startswith(_NAME) for one in below)
            yield (_FLAT if flat else _OTHER) if below else _EMPTY
        else:  # an integer of many digits costs at each use
            yield _SCALAR if kind.name in _SCALARS and opcode.name != "LONG4" else _OTHER
