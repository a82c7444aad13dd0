"""Model Breadcrumbs: drop both the largest and the smallest changes of each task vector, sum the rest.

Per tensor and model the share `gamma` of the entries with the largest magnitude is dropped as outliers, and so many of
the smallest as noise that the share `density` is left; θ = θ₀ + λ Σ wᵢ δ̂ᵢ.

Use it like task arithmetic when a few extreme changes dominate. If `density` leaves no room for `gamma`, fewer of the
largest are dropped; none are in a tensor so small that `gamma` is less than one entry. Thresholds are exact order
statistics, and entries of exactly the threshold's magnitude are kept.

In a mergekit recipe `density` is 1 by default and `weight` must be given. Two things differ from mergekit: it keeps
only some of the entries at the threshold, and it drops the whole change of a tensor of which no outlier is dropped
(100 entries or fewer, at its default `gamma`), which is a slip that regraft does not repeat.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from regraft.merge.consensus import Density, TaskVectorOptions, onto_base, total
from regraft.merge.rule import REQUIRED, PerModel, Steps, Unit, rule
from regraft.merge.sparsify import middle, norms_restored
from regraft.methods import Paper


class BreadcrumbsOptions(TaskVectorOptions):
    density: PerModel[Density] = Field((0.9,), description="share of entries that is kept, in (0, 1]")
    gamma: PerModel[Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.01,), description="share of the largest entries that is dropped, in [0, 1)"
    )
    normalize: bool = Field(False, description="divide the sum of task vectors by the sum of the weights")
    rescale: bool = Field(False, description="restore each task vector's L1 norm")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")


@rule(
    summary="drop the largest and the smallest changes, sum the rest",
    options=BreadcrumbsOptions,
    needs_base=True,
    order_statistics=2,
    papers=[
        Paper(
            "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
            "Davari, Belilovsky",
            "ECCV 2024",
            "2312.06795",
        )
    ],
    mergekit_defaults={"weight": REQUIRED, "density": 1.0},
)
def breadcrumbs(unit: Unit[BreadcrumbsOptions]) -> Steps:
    sparse = yield from middle(unit, unit.options.density, unit.options.gamma)
    if unit.options.rescale:
        sparse = yield from norms_restored(unit, sparse)
    return onto_base(sparse, total)
