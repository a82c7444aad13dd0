"""Model Breadcrumbs (arXiv:2312.06795): the masks and the registration that the two breadcrumbs rules share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import Field

from regraft.merge.consensus import Density, TaskVectorOptions
from regraft.merge.rule import REQUIRED, PerModel, Unit, rule
from regraft.merge.sparsify import Stage, middle, norms_restored
from regraft.methods import Paper

_BREADCRUMBS = Paper(
    "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    "Davari, Belilovsky",
    "ECCV 2024",
    "2312.06795",
)
crumbs_rule = partial(
    rule,
    needs_base=True,
    compiled=lambda _: True,
    order_statistics=2,
    papers=[_BREADCRUMBS],
    mergekit_defaults={"weight": REQUIRED, "density": 1.0},
)


class BreadcrumbsOptions(TaskVectorOptions):
    density: PerModel[Density] = Field((0.9,), description="share of entries that is kept, in (0, 1]")
    gamma: PerModel[Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.01,), description="share of the largest entries that is dropped, in [0, 1)"
    )
    normalize: bool = Field(False, description="divide the sum of task vectors by the sum of the weights")
    rescale: bool = Field(False, description="restore each task vector's L1 norm")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")


def masked(unit: Unit[Any]) -> Stage:
    """Task vectors without their largest and smallest entries."""
    o: BreadcrumbsOptions = unit.options
    sparse = yield from middle(unit, o.density, o.gamma)
    if o.rescale:
        sparse = yield from norms_restored(unit, sparse)
    return sparse
