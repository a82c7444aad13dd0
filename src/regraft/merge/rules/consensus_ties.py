"""Consensus merging with TIES: trim, elect signs and sum, then keep the entries that enough tasks need.

    τ  = Σ of the trimmed wᵢ δᵢ that have the elected sign
    mₜ = 1 where |δₜ| > λₜ |τ − δₜ|        the TALL mask of each task
    θ  = θ₀ + λ τ where at least k of the masks are 1,  θ₀ elsewhere

As `consensus_task_arithmetic`, with the merged task vector of TIES: each δᵢ is trimmed to the share `density` of its
largest entries over the whole model, and per entry those with the sign of the sum are summed, not averaged. `k: 0` is
`ties` with `normalize: false`. Masks compare with the untrimmed δₜ. A sum of exactly zero elects "+"; for the threshold
see `ties`, for the options `tall_mask` and `consensus_task_arithmetic`.
"""

from __future__ import annotations

from regraft.merge.rule import Steps, Unit
from regraft.merge.tall import ConsensusOptions, TrimOptions, of_consensus, tall_ties_rule, trimmed_and_elected


class ConsensusTiesOptions(ConsensusOptions, TrimOptions):
    pass


@tall_ties_rule(
    summary="merge as TIES by a sum, keep the entries that several tasks need",
    options=ConsensusTiesOptions,
    min_models=2,
)
def consensus_ties(unit: Unit[ConsensusTiesOptions]) -> Steps:
    merged = yield from trimmed_and_elected(unit)
    return of_consensus(merged)
