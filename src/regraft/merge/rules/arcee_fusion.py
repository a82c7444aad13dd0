"""Arcee Fusion: take from the other model the entries that matter most, and keep the base's everywhere else.

    importance = |θ₁ − θ₀| · KL(softmax(row of θ₁) ‖ softmax(row of θ₀))
    threshold  = median + 1.5 · (third quartile − first quartile) of the importance, per tensor

Entries that reach the threshold become θ₁, all others stay θ₀. A row is what lies along the last axis. Use it to bring
the salient changes of a model into its base, where `nearswap` brings the small ones. There is nothing to set: how much
changes depends on how unevenly the importance is spread, and of a tensor of which three quarters are the same in both
models every change is taken.

The quartiles are exact order statistics; mergekit takes those of a million entries drawn at random where a tensor has
more. The divergence is computed in float64 (in float32 its rounding is larger than itself for light fine-tunes), with
1e-8 added to each probability as there. So entries near the threshold can come out otherwise than in mergekit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from regraft.merge.rule import Chunk, Steps, Unit, rule
from regraft.merge.statistics import OrderStatistic
from regraft.methods import Options

if TYPE_CHECKING:
    from torch import Tensor

_SPREADS = 1.5  # interquartile ranges above the median
_EPSILON = 1e-8


@rule(
    summary="take the most important changes of the other model whole",
    options=Options,
    rows_beside=32,
    needs_base=True,
    order_statistics=3,
    max_models=1,
    span=lambda _: "rows",
)
def arcee_fusion(unit: Unit[Options]) -> Steps:
    last = unit.numel - 1
    scores = OrderStatistic(_importance, ranks=[last // 4, last // 2, 3 * last // 4])
    (found,) = yield [scores]
    low, median, high = found[0]
    threshold = median + _SPREADS * (high - low)
    unit.note(threshold=float(threshold))

    def combine(c: Chunk[Options]) -> Tensor:
        return torch.where(_importance(c) >= float(threshold), c.models[0], c.base)

    return combine


def _importance(c: Chunk[Options]) -> Tensor:
    width = (c.info.shape or (1,))[-1]
    p, q = (torch.softmax(x.view(-1, width).double(), 1) + _EPSILON for x in (c.models[0], c.base))
    divergence = (p * (p / q).log()).sum(1, keepdim=True)
    return (c.deltas[0].abs().view(-1, width) * divergence).flatten().to(c.dtype)
