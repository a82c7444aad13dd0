"""Elementwise work that the rules share, each piece once for the processor (`native`) and once in torch.

The torch twins run on accelerators; on the processor they would take a pass through memory per operation. Both give the
same bits, except for the order of additions within the blocks of a sum. Arguments are dense and float32 or float64:
task vectors (n, L), one number per model as a sequence, one value per element (L,).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regraft.checkpoint.tensor import BLOCK

if TYPE_CHECKING:
    from regraft.merge.rule import Chunk

_ARITHMETIC = (torch.float32, torch.float64)
_BITS = {
    torch.float32: torch.uint32,
    torch.float64: torch.uint64,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
}
_SIGNLESS = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF), 8: np.uint64(0x7FFFFFFFFFFFFFFF)}


def fused(*tensors: Tensor) -> bool:
    """Whether the compiled loops serve these tensors."""
    return all(tensor.is_cpu and tensor.dtype in _ARITHMETIC for tensor in tensors)


def array(tensor: Tensor) -> Any:
    """The tensor's memory as a C-contiguous array."""
    return tensor.contiguous().numpy()


def bit_array(tensor: Tensor) -> Any:
    """A float tensor's memory as unsigned integers."""
    return tensor.contiguous().view(_BITS[tensor.dtype]).numpy()


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], dtype: torch.dtype) -> Any:
    return torch.tensor(values, dtype=dtype).numpy()


def numbers(values: Sequence[float], like: Tensor | torch.dtype) -> Any:
    """One number per model as an array (n,), in the dtype of `like`."""
    return _numbers(tuple(values), like.dtype if isinstance(like, Tensor) else like)


def stored(chunk: Chunk[Any]) -> Any | None:
    """Models, and the base if there is one, as they are stored, (n or n + 1, L): bfloat16 as uint16, or float32.

    For the loops in `native_sparse`. None if they are stored otherwise, or elsewhere.
    """
    rows = chunk.rows
    if not isinstance(rows, Tensor) or not rows.is_cpu or chunk.dtype != torch.float32:
        return None
    if rows.dtype == torch.bfloat16:
        return bit_array(rows)
    return array(rows) if rows.dtype == torch.float32 else None


@lru_cache(maxsize=64)
def _most_bits(dtype: torch.dtype, limit: float) -> Any:
    """The bits of the largest value of a dtype that is not above the limit."""
    most = torch.tensor([limit], dtype=torch.float64).to(dtype)
    if float(most) > limit:
        most = torch.nextafter(most, torch.zeros_like(most))
    return bit_array(most)[0]


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per model as a column (n, 1), in the dtype of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def added(rows: Iterable[Tensor]) -> Tensor:
    """Sum over models, (n, L) -> (L,), in their order, at least one.

    `rows.sum(0)` may add in another order in a slice of another length, and results must not depend on how tensors are
    cut.
    """
    each = iter(rows)
    out = next(each).clone()
    for row in each:
        out += row
    return out


def widened(rows: Tensor | Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Rows of any float dtype as one tensor (n, L) of `dtype` (float32 or float64), without a copy if they are."""
    if isinstance(rows, Tensor):
        if rows.dtype == dtype:
            return rows
        if rows.dtype == torch.bfloat16 and dtype == torch.float32 and rows.is_cpu:
            from regraft.merge.native import widen_bf16

            out = torch.empty(rows.shape, dtype=dtype)
            widen_bf16(bit_array(rows).reshape(-1), bit_array(out).reshape(-1))
            return out
        return rows.to(dtype)
    return torch.stack([row.to(dtype) for row in rows])


def differences(rows: Tensor | Sequence[Tensor], base: Tensor) -> Tensor:
    """rows - base, (n, L), formed in the dtype of `base`, (L,); rows as in `widened`."""
    if isinstance(rows, Tensor) and rows.dtype == torch.bfloat16 and base.dtype == torch.float32 and rows.is_cpu:
        from regraft.merge.native import widen_bf16_minus

        out = torch.empty(rows.shape, dtype=base.dtype)
        widen_bf16_minus(bit_array(rows), array(base), out.numpy(), bit_array(out))
        return out
    return widened(rows, base.dtype) - base


def narrow(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Values rounded to `dtype`, and whether all magnitudes are within its range (False if there is a NaN)."""
    if dtype == torch.bfloat16 and values.dtype == torch.float32 and values.is_cpu:
        from regraft.merge.native import narrow_bf16

        out = torch.empty(values.shape, dtype=dtype)
        most = narrow_bf16(bit_array(values), bit_array(out))
        return out, bool(most <= _most_bits(torch.float32, torch.finfo(dtype).max))
    limit = torch.finfo(dtype).max
    within = limit >= torch.finfo(values.dtype).max or all_within(values, limit)
    return values.to(dtype), within


def all_within(values: Tensor, limit: float) -> bool:
    """Whether no magnitude is above `limit`; False if there is a NaN. bf16 and fp16 are looked at as they are."""
    if values.numel() == 0:
        return True
    if values.is_cpu and values.dtype in _BITS:
        from regraft.merge.native import largest_bits

        bits = bit_array(values).reshape(-1)
        return bool(largest_bits(bits, _SIGNLESS[bits.dtype.itemsize]) <= _most_bits(values.dtype, limit))
    wide = values if values.dtype.itemsize > 1 else values.float()
    return bool((wide.abs() <= limit).all())


def weighted_sum(rows: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ wᵢ · rows[i], (L,), in the order of the models; those of weight 0 are not looked at."""
    if fused(rows):
        from regraft.merge import native

        out = torch.empty_like(rows[0])
        native.weighted_sum(array(rows), numbers(weights, rows), out.numpy())
        return out
    return added([torch.zeros_like(rows[0]), *(row * w for row, w in zip(rows, weights, strict=True) if w)])


def weighted_distance(rows: Tensor, first: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ wᵢ · (rows[i] - first), (L,), in the order of the models; those of weight 0 are not looked at."""
    if fused(rows, first):
        from regraft.merge import native

        out = torch.empty_like(first)
        native.weighted_distance(array(rows), array(first), numbers(weights, rows), out.numpy())
        return out
    return added([torch.zeros_like(first), *((row - first) * w for row, w in zip(rows, weights, strict=True) if w)])


def mixture(chunk: Chunk[Any], weights: Sequence[float], anchor: int) -> Tensor:
    """The anchor + Σ wᵢ · (models[i] - anchor), (L,), with the model of that number as the anchor.

    Equal to the weighted sum if the weights add up to one, but what is equal in all models keeps its bits.
    """
    raw = stored(chunk)
    if raw is None or chunk.has_base:
        first = chunk.models[anchor]
        return changed(first, weighted_distance(chunk.models, first, weights))
    from regraft.merge.native_sparse import distance

    out = np.empty(chunk.length, np.float32)
    distance(raw, numbers(weights, chunk.dtype), anchor, out)
    return torch.from_numpy(out)


def elect(rows: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Weighted sum of the entries whose weighted sign won, (L,); their weighted mean if `normalize`."""
    if fused(rows):
        from regraft.merge import native

        out = torch.empty_like(rows[0])
        native.elect(array(rows), numbers(weights, rows), normalize, out.numpy())
        return out
    factors = column(weights, rows)
    sizes, sign = winners(rows * factors)
    merged = added(sizes) * sign
    if normalize:
        divisor = added(torch.sign(sizes) * factors)
        merged = merged / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return merged


def winners(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes (n, L) of the entries that have the sign of their column's sum, 0 for the others, and that sign (L,).

    A sum of exactly zero counts as positive (TIES, arXiv:2306.01708, elects by total magnitude).
    """
    if fused(rows):
        from regraft.merge import native

        sizes, sign = torch.empty_like(rows), torch.empty_like(rows[0])
        native.winners(array(rows), sizes.numpy(), sign.numpy())
        return sizes, sign
    ones = torch.ones_like(rows[0])
    sign = torch.where(added(rows) >= 0, ones, -ones)
    return (rows * sign).clamp_(min=0), sign


def changed(base: Tensor, change: Tensor, factor: float = 1.0) -> Tensor:
    """`base + factor · change`; an entry that does not change keeps its bits (-0.0 + 0.0 would be 0.0)."""
    if fused(base, change):
        from regraft.merge import native

        out = torch.empty_like(base)
        native.changed(array(base), array(change), array(base).dtype.type(factor), out.numpy())
        return out
    step = change * factor
    return torch.where(step == 0, base, base + step)


def between(rows: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    """Entries whose magnitude is in [low[i], high[i]], 0 for the others, (n, L). A NaN stays."""
    if fused(rows):
        from regraft.merge import native

        out = torch.empty_like(rows)
        native.between(array(rows), numbers(low, rows), numbers(high, rows), out.numpy())
        return out
    sizes = rows.abs()
    outside = (sizes < column(low, rows)) | (sizes > column(high, rows))
    return torch.where(outside, torch.zeros_like(rows), rows)


def variance(rows: Tensor) -> Tensor:
    """Population variance over the models, (L,); exactly 0 where they are equal: distances are to the first one."""
    if fused(rows):
        from regraft.merge import native

        out = torch.empty_like(rows[0])
        native.variance(array(rows), out.numpy())
        return out
    count = rows.new_tensor(len(rows))  # divided by a plain number, CUDA multiplies by its inverse: another last bit
    apart = rows - rows[0]
    apart = apart - added(apart) / count
    return added(apart.square()) / count


def block_sums(rows: Tensor, *, absolute: bool, block: int = BLOCK) -> Tensor:
    """Sums of the values, or of the magnitudes, of each row over blocks of elements: (n, blocks), float64."""
    blocks = -(-rows.shape[1] // block)
    if fused(rows):
        from regraft.merge import native

        out = np.empty((rows.shape[0], blocks))
        native.block_sums(array(rows), block, absolute, out)
        return torch.from_numpy(out)
    parts = (rows.abs() if absolute else rows).split(block, 1)
    return torch.stack([p.sum(1, dtype=torch.float64) for p in parts], 1).cpu() if parts else rows.new_zeros(0)


def block_grams(rows: Tensor, *, block: int = BLOCK) -> Tensor:
    """Inner products between rows over blocks of elements: (blocks, n, n), float64."""
    n, length = rows.shape
    if fused(rows):
        from regraft.merge import native

        out = np.empty((-(-length // block), n, n))
        native.block_grams(array(rows), block, out)
        return torch.from_numpy(out)
    parts = [p.double() for p in rows.split(block, 1)]
    return torch.stack([p @ p.T for p in parts]).cpu()


def stored_grams(raw: Any, n: int, *, block: int) -> Tensor:
    """As `block_grams`, of the first n rows of what `stored` gave, less the last one if that is the n + 1st."""
    from regraft.merge.native_sparse import grams

    out = np.empty((-(-raw.shape[1] // block), n, n))
    grams(raw, n, block, out)
    return torch.from_numpy(out)


def sign_conflicts(rows: Tensor) -> tuple[int, int]:
    """(columns in which any entry is not zero, columns with entries of both signs)."""
    if fused(rows):
        from regraft.merge import native

        moved, both = native.sign_conflicts(array(rows))
        return int(moved), int(both)
    up, down = (rows > 0).any(0), (rows < 0).any(0)
    return int((up | down).sum()), int((up & down).sum())


def count_zeros(rows: Tensor) -> Tensor:
    """Entries of each row that are zero, (n,) int64."""
    if fused(rows):
        from regraft.merge import native

        out = np.zeros(rows.shape[0], np.int64)
        native.count_zeros(array(rows), out)
        return torch.from_numpy(out)
    return (rows == 0).sum(1).cpu()
