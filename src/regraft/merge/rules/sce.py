"""SCE: select entries that vary between models, weight models by the size of their change, erase minority signs.

Per tensor: (1) keep the share `select_topk` of the entries with the largest variance over the models, counted
among those that vary at all; (2) weight each model by its mean squared change in what was kept; (3) per entry keep the
models that have the sign of the sum, and average them with these weights; add to the base.

Use it to fuse chat models that were trained from one base for different strengths (FuseChat 3.0). `select_topk` of 0.1
to 0.5 is usual; 1 keeps all. Entries with exactly the variance of the threshold are all kept (mergekit keeps some of
them). As in mergekit, models get equal weights where their mean squared changes add up to less than 1e-6, which is so
in most tensors of lightly tuned language models; the lineage file has the weights of each tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field

from regraft.merge.consensus import added, blended, changed, winners
from regraft.merge.kernels import Values, numbers, stored, variance
from regraft.merge.rule import Chunk, Steps, Unit, rule
from regraft.merge.statistics import OrderStatistic, Sum
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-6  # mergekit's guard of the sum of weights


class SceOptions(Options):
    select_topk: float = Field(1.0, ge=0, le=1, description="share of the varying entries that is kept, in [0, 1]")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")


@rule(
    summary="select by variance, weight by squared change, erase minority signs",
    options=SceOptions,
    needs_base=True,
    order_statistics=1,
    min_models=2,
    compiled=lambda _: True,
    papers=[Paper("FuseChat: Knowledge Fusion of Chat Models", "Wan et al.", "EMNLP 2025", "2408.07990")],
)
def sce(unit: Unit[SceOptions]) -> Steps:
    threshold = 0.0
    if unit.options.select_topk < 1:
        (varying,) = yield [Sum(_varying)]
        # In float32 as in mergekit, which takes 384.99999999999994 entries for 385.
        keep = min(int(np.float32(varying[0]) * np.float32(unit.options.select_topk)), int(varying[0]))
        if keep == 0:
            return blended([0.0] * unit.n, has_base=True)
        (found,) = yield [OrderStatistic(variances, ranks=[unit.numel - keep])]
        threshold = float(found[0, 0])
        unit.note(threshold=threshold)
    (squares,) = yield [_Squares(threshold)]
    means = squares / unit.numel
    size = float(means.sum())
    weights = [float(m) / size for m in means] if size >= 1e-6 else [1 / unit.n] * unit.n
    unit.note(weights=weights)

    def combine(c: Chunk[SceOptions]) -> Values:
        raw = stored(c)
        if raw is not None:
            from regraft.merge.native_sce import merge

            out = np.empty(c.length, np.float32)
            merge(raw, np.float32(threshold), numbers(weights, "F32"), np.float32(_LEAST), out)
            return out
        sizes, sign = winners(selected(c, threshold))
        share = torch.sign(sizes) * c.per_model(weights)
        return changed(c.base, added(sizes * share) * sign / added(share).clamp(min=_LEAST))

    return combine


def variances(c: Chunk[SceOptions]) -> Values:
    """Population variance of the task vectors over the models, (L,)."""
    raw = stored(c)
    if raw is None:
        return variance(c.deltas)
    from regraft.merge import native_sce

    out = np.empty(c.length, np.float32)
    native_sce.variances(raw, out)
    return out


def _varying(c: Chunk[SceOptions]) -> Values:
    """1 where the models differ, (L,)."""
    values = variances(c)
    return np.sign(values) if isinstance(values, np.ndarray) else values.sign()


def selected(c: Chunk[SceOptions], threshold: float) -> Tensor:
    """Task vectors, (n, L), with 0 where the variance is below the threshold."""
    return c.deltas * (variance(c.deltas) >= threshold) if threshold > 0 else c.deltas


class _Squares(Sum):
    """Σ δ² of each model over the selected entries; result: float64, shape (n,)."""

    def __init__(self, threshold: float) -> None:
        super().__init__(lambda c: selected(c, threshold).square())
        self._threshold = threshold

    def partial(self, chunk: Chunk[Any]) -> np.ndarray:
        raw = stored(chunk)
        if raw is None:
            return super().partial(chunk)
        from regraft.merge.native_sce import squares

        out = np.empty((chunk.n, -(-chunk.length // chunk.block)))
        squares(raw, np.float32(self._threshold), chunk.block, out)
        return out
