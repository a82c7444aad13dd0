"""DELLA: drop small entries of each row more often than large ones, elect signs, average what agrees with them.

    pᵢ = density − ε + 2 ε · rank / (width − 1)          rank of |δ| within its row, 0 for the smallest
    δ̂ᵢ = mask · δᵢ / pᵢ,   mask ~ Bernoulli(pᵢ) per entry
    θ  = θ₀ + λ · mean of the δ̂ᵢ that have the elected sign

Use it where `dare_ties` drops too much of what matters: with the same density, large changes survive more often.
`epsilon: 0` is DARE. A row is all axes but the first; a vector is one row.

`normalize: false` sums what agrees instead. In a mergekit recipe `rescale: true` restores the L1 norm of each tensor,
`density` is 1 by default and `weight` must be given; its own draws cannot be reproduced. mergekit ranks tensors of more
than two axes along the second one only.
"""

from __future__ import annotations

from pydantic import Field

from regraft.merge.consensus import elected, onto_base
from regraft.merge.magprune import DellaOptions, della_rule, dropped
from regraft.merge.rule import Steps, Unit


class DellaElectOptions(DellaOptions):
    normalize: bool = Field(True, description="mean instead of sum of the values that agree")


@della_rule(
    summary="drop task-vector entries at random, small ones more often, then average what agrees in sign",
    options=DellaElectOptions,
)
def della(unit: Unit[DellaElectOptions]) -> Steps:
    sparse = yield from dropped(unit)
    return onto_base(sparse, elected)
