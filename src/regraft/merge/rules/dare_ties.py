"""DARE with sign election: drop and rescale at random, then sum only the entries whose sign won.

As `dare_linear` up to the rescaled task vectors δ̂ᵢ; then per parameter the sign of Σ wᵢ δ̂ᵢ is elected and the entries
that have it are summed (`normalize: true`: averaged): θ = θ₀ + λ · sum.

Use it instead of `dare_linear` when the fine-tunes pull in different directions. The paper runs the whole of TIES, trim
included, on the rescaled vectors; with 80 % or more dropped that trim removes nothing, which is the case this rule is
for. As in mergekit the weighted sum is not normalised by default. Random draws, `rescale` and mergekit's meaning:
see `dare_linear`.
"""

from __future__ import annotations

from regraft.merge.consensus import elected, onto_base
from regraft.merge.dare import DareOptions, dare_rule, rescaled, sparse_before
from regraft.merge.rule import Steps, Unit


@dare_rule(
    summary="drop task-vector entries at random and rescale, then sum what agrees in sign",
    options=DareOptions,
)
def dare_ties(unit: Unit[DareOptions]) -> Steps:
    sparse = yield from rescaled(unit)
    return onto_base(sparse, elected, sparse_before(unit))
