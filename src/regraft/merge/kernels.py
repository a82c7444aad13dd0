"""Elementwise work that the rules share, each piece once for the processor (`native`) and once in torch.

The torch twins run on accelerators; on the processor they would take a pass through memory per operation. Both give the
same bits, except for the order of additions within the blocks of a sum. Arguments are dense and float32 or float64:
task vectors (n, L), one number per model as a sequence, one value per element (L,).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch

from regraft.checkpoint.dtypes import as_array, item_size
from regraft.checkpoint.tensor import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from regraft.merge.chunk import Chunk

# Elements, or numbers, as the torch twins take and give them, or as the compiled loops do.
Values: TypeAlias = "Tensor | np.ndarray"


def fused(*values: Values) -> bool:
    """Whether the compiled loops serve these values."""
    return all(
        isinstance(one, np.ndarray) or (one.is_cpu and one.dtype in (torch.float32, torch.float64)) for one in values
    )


def array(values: Values) -> np.ndarray:
    """The memory of a CPU tensor as a C-contiguous array; an array as it is."""
    return values if isinstance(values, np.ndarray) else values.contiguous().numpy()  # type: ignore[no-any-return]


def in_rows(values: Values) -> Any:
    """Values (L,) or (n, L) as (n, L)."""
    return np.atleast_2d(values) if isinstance(values, np.ndarray) else torch.atleast_2d(values)


def bit_array(tensor: Tensor) -> Any:
    """A float tensor's memory as unsigned integers."""
    return bits(as_array(tensor))


def bits(values: Any) -> Any:
    """An array's memory as unsigned integers."""
    return values.view(f"u{values.itemsize}")


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], itemsize: int) -> Any:
    return np.array(values, f"f{itemsize}")


def numbers(values: Sequence[float], like: Any) -> Any:
    """One number per model as an array (n,), in the dtype of `like`: a tensor, an array or "F32", "F64"."""
    return _numbers(tuple(values), item_size(like) if isinstance(like, str) else like.itemsize)


def stored(chunk: Chunk[Any]) -> Any | None:
    """Models, and the base if there is one, as they are stored, (n or n + 1, L): bfloat16 as uint16, or float32.

    For the loops in `native_sparse`. None if they are stored otherwise, or elsewhere.
    """
    if chunk.arithmetic != "F32":
        return None
    if chunk.stored is not None:
        return chunk.stored.array if chunk.stored.dtype in ("BF16", "F32") else None
    rows = chunk.rows
    if not isinstance(rows, torch.Tensor) or not rows.is_cpu or rows.dtype not in (torch.bfloat16, torch.float32):
        return None
    return as_array(rows)


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
    if isinstance(rows, torch.Tensor):
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
    dtypes = (torch.bfloat16, torch.float32)
    if isinstance(rows, torch.Tensor) and rows.is_cpu and (rows.dtype, base.dtype) == dtypes:
        from regraft.merge.native import widen_bf16_minus

        out = torch.empty(rows.shape, dtype=base.dtype)
        widen_bf16_minus(bit_array(rows), array(base), out.numpy(), bit_array(out))
        return out
    return widened(rows, base.dtype) - base


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


def _check_count(chunk: Chunk[Any], weights: Sequence[float]) -> None:
    """Compiled loops would read beyond the rows that are there."""
    if len(weights) != chunk.n:
        raise ValueError(f"{len(weights)} weights for {chunk.n} models")


def models_sum(chunk: Chunk[Any], weights: Sequence[float]) -> Values:
    """Σ wᵢ · models[i], (L,), in the order of the models; those of weight 0 are not looked at."""
    _check_count(chunk, weights)
    raw = stored(chunk)
    if raw is None:
        return weighted_sum(chunk.models, weights)
    from regraft.merge import native_sparse

    out = np.empty(chunk.length, np.float32)
    native_sparse.weighted_sum(raw, numbers(weights, "F32"), out)
    return out


def mixture(chunk: Chunk[Any], weights: Sequence[float], anchor: int, *, of_changes: bool = False) -> Values:
    """The anchor + Σ wᵢ · (models[i] - anchor), (L,), with the model of that number as the anchor.

    Equal to the weighted sum if the weights add up to one, but what is equal in all models keeps its bits. With
    `of_changes` the differences that are added are those to the base.
    """
    _check_count(chunk, weights)
    raw = stored(chunk)
    if raw is None:
        first = chunk.models[anchor]
        if of_changes:
            return changed(first, weighted_sum(chunk.deltas, weights))
        return changed(first, weighted_distance(chunk.models, first, weights))
    from regraft.merge.native_sparse import distance

    out = np.empty(chunk.length, np.float32)
    distance(raw, numbers(weights, "F32"), anchor, chunk.n if of_changes else anchor, out)
    return out


def with_changes(chunk: Chunk[Any], weights: Sequence[float]) -> Values:
    """The base + Σ wᵢ δᵢ, (L,); an entry that does not change keeps its bits."""
    _check_count(chunk, weights)
    raw = stored(chunk)
    if raw is None:
        return changed(chunk.base, weighted_sum(chunk.deltas, weights))
    from regraft.merge.native_sparse import distance

    out = np.empty(chunk.length, np.float32)
    distance(raw, numbers(weights, "F32"), chunk.n, chunk.n, out)
    return out


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


@overload
def changed(base: Tensor, change: Tensor, factor: float = 1.0) -> Tensor: ...
@overload
def changed(base: np.ndarray, change: np.ndarray, factor: float = 1.0) -> np.ndarray: ...
def changed(base: Any, change: Any, factor: float = 1.0) -> Values:
    """`base + factor · change`; an entry that does not change keeps its bits (-0.0 + 0.0 would be 0.0)."""
    if fused(base, change):
        from regraft.merge import native

        given = array(base)
        out = np.empty_like(given)
        native.changed(given, array(change), given.dtype.type(factor), out)
        return out if isinstance(base, np.ndarray) else torch.from_numpy(out)
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


def block_sums(rows: Values, *, absolute: bool, block: int = BLOCK) -> np.ndarray:
    """Sums of the values, or of the magnitudes, of each row over blocks of elements: (n, blocks), float64."""
    blocks = -(-rows.shape[1] // block)
    if fused(rows):
        from regraft.merge import native

        out = np.empty((rows.shape[0], blocks))
        native.block_sums(array(rows), block, absolute, out)
        return out
    rows = torch.as_tensor(rows)
    parts = (rows.abs() if absolute else rows).split(block, 1)
    return array(torch.stack([p.sum(1, dtype=torch.float64) for p in parts], 1).cpu())


def block_grams(rows: Values, *, block: int = BLOCK) -> np.ndarray:
    """Inner products between rows over blocks of elements: (blocks, n, n), float64."""
    n, length = rows.shape
    if fused(rows):
        from regraft.merge import native

        out = np.empty((-(-length // block), n, n))
        native.block_grams(array(rows), block, out)
        return out
    parts = [p.double() for p in torch.as_tensor(rows).split(block, 1)]
    return array(torch.stack([p @ p.T for p in parts]).cpu())


def stored_grams(raw: Any, n: int, *, block: int) -> np.ndarray:
    """As `block_grams`, of the first n rows of what `stored` gave, less the last one if that is the n + 1st."""
    from regraft.merge.native_sparse import grams

    out = np.empty((-(-raw.shape[1] // block), n, n))
    grams(raw, n, block, out)
    return out


def sign_conflicts(rows: Values) -> tuple[int, int]:
    """(columns in which any entry is not zero, columns with entries of both signs)."""
    if fused(rows):
        from regraft.merge import native

        moved, both = native.sign_conflicts(array(rows))
        return int(moved), int(both)
    rows = torch.as_tensor(rows)
    up, down = (rows > 0).any(0), (rows < 0).any(0)
    return int((up | down).sum()), int((up & down).sum())


def count_zeros(rows: Values) -> np.ndarray:
    """Entries of each row that are zero, (n,) int64."""
    if fused(rows):
        from regraft.merge import native

        out = np.zeros(rows.shape[0], np.int64)
        native.count_zeros(array(rows), out)
        return out
    return array((torch.as_tensor(rows) == 0).sum(1).cpu())
