"""Model Breadcrumbs with an elected sign: drop the extremes of each task vector, sum what agrees in sign.

Per tensor and model the share `gamma` of the entries with the largest magnitude is dropped, and so many of the smallest
that the share `density` is left, as in `breadcrumbs`; then, as in TIES, each entry of the result is the weighted sum of
the values that have the sign of the sum over all models: θ = θ₀ + λ Σ wᵢ δ̂ᵢ over those that agree.

Use it where `breadcrumbs` is the right mask and the models pull entries in opposite directions. The combination is
mergekit's; the paper only sums. `normalize: true` divides each entry by the weights that agreed, the mean of TIES. A
sum of exactly zero elects "+".

In a mergekit recipe `density` is 1 by default and `weight` must be given. Entries of exactly the threshold's magnitude
are all kept (mergekit keeps some of them).
"""

from __future__ import annotations

from pydantic import Field

from regraft.merge.consensus import elected, onto_base
from regraft.merge.crumbs import BreadcrumbsOptions, crumbs_rule, masked
from regraft.merge.rule import Steps, Unit


class BreadcrumbsTiesOptions(BreadcrumbsOptions):
    normalize: bool = Field(False, description="mean instead of sum of the values that agree")


@crumbs_rule(
    summary="drop the largest and the smallest changes, sum what agrees in sign",
    options=BreadcrumbsTiesOptions,
)
def breadcrumbs_ties(unit: Unit[BreadcrumbsTiesOptions]) -> Steps:
    sparse = yield from masked(unit)
    return onto_base(sparse, elected)
