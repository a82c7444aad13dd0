"""TALL masks over TIES: give each task back from the merged task vector of TIES and a mask.

    τ  = Σ of the trimmed wᵢ δᵢ that have the elected sign
    mₜ = 1 where |δₜ| > λₜ |τ − δₜ|
    θ  = θ₀ + λ mₜ τ

As `tall_mask`, with another merged task vector: each δᵢ is trimmed to the share `density` of its largest entries over
the whole model, and per entry those with the sign of the sum are summed, as in `ties` with `normalize: false`. Masks
compare with the untrimmed δₜ. Use it like `tall_mask`, where tasks pull entries in different directions. Without
`task` no mask is applied. A sum of exactly zero elects "+"; for the threshold see `ties`.
"""

from __future__ import annotations

from regraft.merge.rule import Steps, Unit
from regraft.merge.tall import TaskMaskOptions, TrimOptions, of_task, tall_ties_rule, trimmed_and_elected


class TallMaskTiesOptions(TaskMaskOptions, TrimOptions):
    pass


@tall_ties_rule(
    summary="the merged task vector of TIES, from which a mask per task gives each model back",
    options=TallMaskTiesOptions,
)
def tall_mask_ties(unit: Unit[TallMaskTiesOptions]) -> Steps:
    merged = yield from trimmed_and_elected(unit)
    return of_task(merged)
