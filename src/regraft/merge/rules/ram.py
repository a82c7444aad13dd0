"""Reinforced Agent Merging: what one model changed is added whole, what several changed is averaged over those.

Per entry, over the models with |δᵢ| > `epsilon`:   θ = θ₀ + mean(δᵢ)

Use it for models that were trained from one base by reinforcement learning, which changes few entries: an average over
all models would shrink what only one of them has. `epsilon` decides what a change is; where fine-tuning touches every
entry by more than that, the rule is the mean of the models. There are no weights. The paper's variant that makes
unshared changes larger is `ramplus_tl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.merge.consensus import added, changed
from regraft.merge.overlap import RAM, RamOptions, parted
from regraft.merge.rule import Chunk, Combine, Unit, rule

if TYPE_CHECKING:
    from torch import Tensor


@rule(
    summary="add what one model changed, average what several changed",
    options=RamOptions,
    rows_beside=24,
    needs_base=True,
    papers=[RAM],
)
def ram(unit: Unit[RamOptions]) -> Combine:
    def combine(c: Chunk[RamOptions]) -> Tensor:
        deltas, count = parted(c)
        return changed(c.base, added(deltas) / count.clamp(min=1))

    return combine
