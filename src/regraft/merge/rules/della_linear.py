"""DELLA without sign election: drop small entries of each row more often than large ones, then sum.

As `della` up to the rescaled task vectors δ̂ᵢ; then θ = θ₀ + λ Σ wᵢ δ̂ᵢ.

Use it as `dare_linear`, with the same density, when large changes should survive more often than small ones. Ranks,
draws, `rescale` and mergekit's meaning: see `della`.
"""

from __future__ import annotations

from pydantic import Field

from regraft.merge.consensus import onto_base, total
from regraft.merge.magprune import DELLA, DellaOptions, dropped
from regraft.merge.rule import REQUIRED, Steps, Unit, rule


class DellaLinearOptions(DellaOptions):
    normalize: bool = Field(False, description="divide the sum of task vectors by the sum of the weights")


@rule(
    summary="drop task-vector entries at random, small ones more often, then sum",
    options=DellaLinearOptions,
    needs_base=True,
    span=lambda _: "rows",
    papers=[DELLA],
    mergekit_defaults={"weight": REQUIRED, "density": 1.0, "rescale": "l1"},
    mergekit_values={"rescale": {True: "l1", False: "none"}},
)
def della_linear(unit: Unit[DellaLinearOptions]) -> Steps:
    sparse = yield from dropped(unit)
    return onto_base(sparse, total)
