"""Model Breadcrumbs: drop both the largest and the smallest changes of each task vector, sum the rest.

Per tensor and model the share `gamma` of the entries with the largest magnitude is dropped as outliers, and so many of
the smallest as noise that the share `density` is left; θ = θ₀ + λ Σ wᵢ δ̂ᵢ.

Use it like task arithmetic when a few extreme changes dominate. If `density` leaves no room for `gamma`, fewer of the
largest are dropped; none are in a tensor so small that `gamma` is less than one entry. Thresholds are exact order
statistics, and entries of exactly the threshold's magnitude are kept.

In a mergekit recipe `density` is 1 by default and `weight` must be given. Two things differ from mergekit: it keeps
only some of the entries at the threshold, and before its version 0.1.5 it dropped the whole change of a tensor of which
no outlier is dropped (100 entries or fewer, at its default `gamma`), a slip that regraft does not repeat.
"""

from __future__ import annotations

from regraft.merge.consensus import onto_base, total
from regraft.merge.crumbs import BreadcrumbsOptions, crumbs_rule, masked
from regraft.merge.rule import Steps, Unit


@crumbs_rule(
    summary="drop the largest and the smallest changes, sum the rest",
    options=BreadcrumbsOptions,
)
def breadcrumbs(unit: Unit[BreadcrumbsOptions]) -> Steps:
    sparse = yield from masked(unit)
    return onto_base(sparse, total)
