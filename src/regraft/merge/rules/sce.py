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

import math

import torch
from pydantic import Field
from torch import Tensor

from regraft.merge.consensus import added, changed, winners
from regraft.merge.kernels import variance
from regraft.merge.rule import Chunk, Steps, Unit, rule
from regraft.merge.statistics import OrderStatistic, Sum
from regraft.methods import Options, Paper


class SceOptions(Options):
    select_topk: float = Field(1.0, ge=0, le=1, description="share of the varying entries that is kept, in [0, 1]")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")


@rule(
    summary="select by variance, weight by squared change, erase minority signs",
    options=SceOptions,
    needs_base=True,
    min_models=2,
    papers=[Paper("FuseChat: Knowledge Fusion of Chat Models", "Wan et al.", "EMNLP 2025", "2408.07990")],
)
def sce(unit: Unit[SceOptions]) -> Steps:
    threshold = None
    if unit.options.select_topk < 1:
        (varying,) = yield [Sum(lambda c: variance(c.deltas).sign_())]
        keep = math.floor(int(varying) * unit.options.select_topk)
        if keep == 0:
            return lambda c: c.base.clone()
        (found,) = yield [OrderStatistic(lambda c: variance(c.deltas), ranks=[unit.numel - keep])]
        threshold = found[0, 0]
        unit.note(threshold=float(threshold))

    def selected(c: Chunk[SceOptions]) -> Tensor:
        return c.deltas if threshold is None else c.deltas * (variance(c.deltas) >= threshold)

    (squares,) = yield [Sum(lambda c: selected(c).square())]
    means = squares / unit.numel
    size = float(means.sum())
    weights = [float(m) / size for m in means] if size >= 1e-6 else [1 / unit.n] * unit.n
    unit.note(weights=weights)

    def combine(c: Chunk[SceOptions]) -> Tensor:
        sizes, sign = winners(selected(c))
        share = torch.sign(sizes) * c.per_model(weights)
        return changed(c.base, added(sizes * share) * sign / added(share).clamp(min=1e-6))

    return combine
