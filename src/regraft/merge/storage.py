"""From values as they are stored to those that are computed with, and back: task vectors, rounding, range.

See `kernels.stored` for the arrays that are meant here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from regraft.checkpoint.dtypes import DTYPES, as_array, as_tensor, item_size, largest_value
from regraft.merge.kernels import Values, array, bits

_SIGNLESS = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF), 8: np.uint64(0x7FFFFFFFFFFFFFFF)}


@lru_cache(maxsize=64)
def _most_bits(dtype: str, limit: float) -> Any:
    """The bits of the largest value of a dtype that is not above the limit."""
    if dtype == "BF16":  # the upper half of a float32
        return _most_bits("F32", limit) >> np.uint32(16)
    near = np.array([min(limit, largest_value(dtype))]).astype(f"f{item_size(dtype)}")
    # As a Python number: an array would compare in its own precision, after rounding the limit.
    return bits(near if float(near[0]) <= limit else np.nextafter(near, np.zeros_like(near)))[0]


def stored_deltas(raw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Task vectors (n, L) and the base (L,) of what `stored` gave of models and base, as float32."""
    base = stored_base(raw)
    if raw.itemsize == 4:
        return raw[:-1] - base, base
    from regraft.merge.native import widen_bf16_minus

    deltas = np.empty((len(raw) - 1, raw.shape[1]), np.float32)
    widen_bf16_minus(raw[:-1], base, deltas, bits(deltas))
    return deltas, base


def stored_base(raw: Any) -> Any:
    """The base, (L,), of what `stored` gave of models and base, as float32."""
    if raw.itemsize == 4:
        return raw[-1]
    from regraft.merge.native import widen_bf16

    base = np.empty(raw.shape[1], np.float32)
    widen_bf16(raw[-1], bits(base))
    return base


def narrow(values: Values, dtype: str) -> tuple[Any, bool]:
    """Values rounded to `dtype`, as it is stored, and whether all magnitudes are within its range (False for a NaN).

    Args:
        values: an array, or a tensor on any device, of float32 or float64.
    """
    if not isinstance(values, np.ndarray) and values.is_cpu:
        values = array(values)
    limit = largest_value(dtype)
    if isinstance(values, np.ndarray):
        if dtype == "BF16" and values.dtype == np.float32:
            from regraft.merge.native import narrow_bf16

            out = np.empty(values.shape, np.uint16)
            most = narrow_bf16(bits(values), out)
            return out, bool(most <= _most_bits("F32", limit))
        own = "F32" if values.dtype == np.float32 else "F64"
        within = limit >= largest_value(own) or all_within(values, own, limit)
        return (values if dtype == own else as_array(torch.from_numpy(values).to(DTYPES[dtype]))), within
    within = limit >= torch.finfo(values.dtype).max or bool((values.abs() <= limit).all())
    return as_array(values.to(DTYPES[dtype])), within


def all_within(values: Any, dtype: str, limit: float | None = None) -> bool:
    """Whether no magnitude in an array of `array_dtype(dtype)` is above `limit`, by default that of the dtype.

    False if there is a NaN.
    """
    if values.size == 0:
        return True
    limit = largest_value(dtype) if limit is None else limit
    if item_size(dtype) > 1:
        from regraft.merge.native import largest_bits

        raw = bits(values).reshape(-1)
        return bool(largest_bits(raw, _SIGNLESS[raw.itemsize]) <= _most_bits(dtype, limit))
    return bool((as_tensor(values, dtype).float().abs() <= limit).all())
