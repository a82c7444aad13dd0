"""TIES: trim small changes, elect one sign per parameter, average the changes that agree with it.

1. Trim: per model, keep the share `density` of the task vector with the largest magnitude, over the whole model.
2. Elect: per parameter, the sign of the sum of the trimmed task vectors.
3. Merge: the mean of the trimmed values that are not zero and have the elected sign; then θ = θ₀ + λ · mean.

Use it for several fine-tunes of one base on different tasks, where a plain sum interferes. The mean is over fewer terms
than the sum of task arithmetic, so good values of λ lie near or above 1 (the paper's grid: 0.8 to 2.5).

Departures. The threshold is the ⌊kd⌋-th largest magnitude and all that reach it are kept, at least one entry (the
official code keeps one more); the lineage file has the share that was. A sum of exactly zero elects "+" (official: the
majority of all signs in the model). `weight`, which the paper does not have, multiplies before the election, as in
mergekit: a weight can change the elected sign. In a mergekit recipe the trim is per tensor, `density` is 1 by default
and `weight` must be given; where several entries of a tensor have exactly the magnitude of the threshold, mergekit
keeps some of them and regraft all.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.merge.consensus import Density, TaskVectorOptions, elected, onto_base
from regraft.merge.rule import REQUIRED, PerModel, Steps, Unit, rule
from regraft.merge.sparsify import largest, norms_restored
from regraft.methods import Paper


class TiesOptions(TaskVectorOptions):
    density: PerModel[Density] = Field((0.2,), description="share of each task vector that is kept, in (0, 1]")
    normalize: bool = Field(True, description="mean instead of sum of the values that agree")
    rescale: bool = Field(False, description="restore each task vector's L1 norm after trimming")
    trim_scope: Literal["model", "tensor"] = Field("model", description="what the largest magnitudes are taken over")
    int8_mask: bool = Field(False, description="mergekit's saving of memory; has no effect here, masks are never kept")


@rule(
    summary="trim task vectors, elect signs, average what agrees",
    options=TiesOptions,
    needs_base=True,
    order_statistics=1,
    compiled=lambda _: True,
    scope=lambda o: o.trim_scope,
    model_wide=("density", "trim_scope", "rescale"),
    papers=[
        Paper(
            "TIES-Merging: Resolving Interference When Merging Models", "Yadav et al.", "NeurIPS 2023", "2306.01708", 65
        )
    ],
    mergekit_defaults={"weight": REQUIRED, "density": 1.0, "trim_scope": "tensor"},
)
def ties(unit: Unit[TiesOptions]) -> Steps:
    sparse = yield from largest(unit, unit.options.density)
    if unit.options.rescale:
        sparse = yield from norms_restored(unit, sparse)
    return onto_base(sparse, elected)
