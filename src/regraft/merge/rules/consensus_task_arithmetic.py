"""Consensus merging with task arithmetic: sum the task vectors, keep the entries that enough tasks need.

    τ  = Σ wᵢ δᵢ
    mₜ = 1 where |δₜ| > λₜ |τ − δₜ|        the TALL mask of each task
    θ  = θ₀ + λ τ where at least k of the masks are 1,  θ₀ elsewhere

Use it for several fine-tunes of one base on different tasks: entries that no task needs (catastrophic) or only one does
(selfish) are dropped from the sum, as they disturb the others. `k: 0` is `task_arithmetic`, `k: 1` drops only what no
task needs. With two models 2 keeps what both need, which is little: try 1.

`lambda` is the paper's scaling coefficient, chosen on validation data like that of task arithmetic, and so are the
thresholds `tall_mask_lambda` of the masks, among 0.2 to 0.6; see `tall_mask`. `weight` is not the paper's.
"""

from __future__ import annotations

from regraft.merge.rule import Combine, Unit
from regraft.merge.tall import ConsensusOptions, of_consensus, summed, tall_rule


@tall_rule(
    summary="sum the task vectors, keep the entries that several tasks need",
    options=ConsensusOptions,
    min_models=2,
)
def consensus_task_arithmetic(unit: Unit[ConsensusOptions]) -> Combine:
    return of_consensus(summed)
