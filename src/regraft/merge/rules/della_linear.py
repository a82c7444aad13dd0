"""DELLA without sign election: drop small entries of each row more often than large ones, then sum.

As `della` up to the rescaled task vectors δ̂ᵢ; then θ = θ₀ + λ Σ wᵢ δ̂ᵢ.

Use it as `dare_linear`, with the same density, when large changes should survive more often than small ones. Ranks,
draws, `rescale` and mergekit's meaning: see `della`.
"""

from __future__ import annotations

from pydantic import Field

from regraft.merge.consensus import onto_base, total
from regraft.merge.magprune import DellaOptions, della_rule, dropped
from regraft.merge.rule import Steps, Unit


class DellaLinearOptions(DellaOptions):
    normalize: bool = Field(False, description="divide the sum of task vectors by the sum of the weights")


@della_rule(
    summary="drop task-vector entries at random, small ones more often, then sum",
    options=DellaLinearOptions,
)
def della_linear(unit: Unit[DellaLinearOptions]) -> Steps:
    sparse = yield from dropped(unit)
    return onto_base(sparse, total)
