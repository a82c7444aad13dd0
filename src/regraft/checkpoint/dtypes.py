"""Dtypes by the names that safetensors headers give them: what is asked of them without a tensor in sight.

Merging by compiled loops works on memory as it is stored, and starts sooner without torch. So whatever stands between
a file and those loops speaks of dtypes by these names and holds values in arrays; torch's dtypes are looked up where
tensors are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Dtype:
    torch: str  # its name there
    array: Any  # the NumPy dtype of the same memory; unsigned integers for floats that NumPy lacks
    is_float: bool = False
    largest: float = 0.0  # finite value


_KNOWN = {
    "F64": _Dtype("float64", np.dtype(np.float64), True, float(np.finfo(np.float64).max)),
    "F32": _Dtype("float32", np.dtype(np.float32), True, float(np.finfo(np.float32).max)),
    "F16": _Dtype("float16", np.dtype(np.float16), True, 65504.0),
    "BF16": _Dtype("bfloat16", np.dtype(np.uint16), True, 2.0**127 * (2 - 2**-7)),
    "F8_E4M3": _Dtype("float8_e4m3fn", np.dtype(np.uint8), True, 448.0),
    "F8_E5M2": _Dtype("float8_e5m2", np.dtype(np.uint8), True, 57344.0),
    "I64": _Dtype("int64", np.dtype(np.int64)),
    "I32": _Dtype("int32", np.dtype(np.int32)),
    "I16": _Dtype("int16", np.dtype(np.int16)),
    "I8": _Dtype("int8", np.dtype(np.int8)),
    "U8": _Dtype("uint8", np.dtype(np.uint8)),
    "U16": _Dtype("uint16", np.dtype(np.uint16)),
    "U32": _Dtype("uint32", np.dtype(np.uint32)),
    "U64": _Dtype("uint64", np.dtype(np.uint64)),
    "BOOL": _Dtype("bool", np.dtype(np.bool_)),
    "C64": _Dtype("complex64", np.dtype(np.complex64)),
}
_NAMES = {known.torch: name for name, known in _KNOWN.items()}


class _TorchDtypes(Mapping[str, "torch.dtype"]):
    """Names as they stand in safetensors headers -> torch's dtypes. Looking at the names alone does without torch."""

    def __getitem__(self, name: str) -> torch.dtype:
        known = _KNOWN[name]
        import torch

        return getattr(torch, known.torch)  # type: ignore[no-any-return]

    def __contains__(self, name: object) -> bool:
        return name in _KNOWN

    def __iter__(self) -> Iterator[str]:
        return iter(_KNOWN)

    def __len__(self) -> int:
        return len(_KNOWN)


DTYPES: Mapping[str, torch.dtype] = _TorchDtypes()


@lru_cache(maxsize=64)
def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors gives a dtype of torch.

    Raises:
        ValueError: a dtype that safetensors cannot hold.
    """
    name = _NAMES.get(str(dtype).removeprefix("torch."))
    if name is None:
        raise ValueError(f"{dtype} is a dtype that safetensors cannot hold")
    return name


def is_storable(dtype: torch.dtype) -> bool:
    """Whether safetensors can hold a dtype of torch."""
    return str(dtype).removeprefix("torch.") in _NAMES


def item_size(name: str) -> int:
    """Bytes per element."""
    size: int = _KNOWN[name].array.itemsize
    return size


def array_dtype(name: str) -> Any:
    """The NumPy dtype of memory that holds such values: bfloat16 and float8 as unsigned integers of their width."""
    return _KNOWN[name].array


def is_float(name: str) -> bool:
    """Whether these are real numbers that can be merged."""
    return _KNOWN[name].is_float


def largest_value(name: str) -> float:
    """The largest finite value of a float dtype."""
    return _KNOWN[name].largest


def torch_name(name: str) -> str:
    """What torch, and so a model's configuration, calls it: "BF16" is "bfloat16"."""
    return _KNOWN[name].torch


def from_torch_name(name: str) -> str:
    """The other way: "bfloat16" is "BF16". KeyError for one that is not known."""
    return _NAMES[name]


def as_tensor(values: Any, name: str) -> torch.Tensor:
    """Memory of `array_dtype(name)` as a tensor, without a copy."""
    import torch

    return torch.from_numpy(values).view(DTYPES[name])


def as_array(values: torch.Tensor) -> np.ndarray:
    """A tensor as an array of `array_dtype` of its dtype, without a copy if it is contiguous and on the CPU."""
    import torch

    wanted = array_dtype(dtype_name(values.dtype))
    flat = values.detach().cpu().contiguous()
    if wanted.kind == "u":
        flat = flat.view(getattr(torch, wanted.name))
    return flat.numpy()  # type: ignore[no-any-return]


def as_doubles(values: Any, name: str) -> Any:
    """Values that are stored as a float dtype in float64."""
    if name == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if item_size(name) == 1:
        return as_tensor(values, name).double().numpy()
    return values.astype(np.float64)


def main_dtype(sizes: Iterable[tuple[str, int]]) -> str:
    """The dtype of most of the weights, from dtype and number of elements of each tensor; integers do not count."""
    total: dict[str, int] = {}
    for name, count in sizes:
        if is_float(name):
            total[name] = total.get(name, 0) + count
    return max(total, key=lambda name: total[name]) if total else "F32"
