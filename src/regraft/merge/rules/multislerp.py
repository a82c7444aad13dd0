"""Spherical average of several models: the weighted mean of their directions, with the weighted mean of their norms.

    u = Σ wᵢ θᵢ / ‖θᵢ‖,   result = Σ wᵢ ‖θᵢ‖ · u / ‖u‖

per tensor; with a base, of the task vectors, and added to the base. Use it like `linear` for models or task vectors
that point in different directions, whose plain average is shorter than each of them. For equal weights, two models and
equal norms it is `slerp` at t = 0.5.

mergekit writes the same as one step of interpolation in the tangent space at u / ‖u‖. There the weighted sum of the
tangent vectors is zero, as u is their mean, so that the step leads nowhere and only the formula above is left.

`eps` is added to each norm. If ‖u‖ is below it, or below the 1e-7 that rounding leaves, directions cancel out and the
weighted average is taken, which gives the base where no model changed a tensor (mergekit does so for two models only,
and stops for more). If `weight` adds up to zero it cannot be normalised and is used as it is, with a warning (mergekit
divides by zero). In a mergekit recipe `weight` must be given.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from regraft.merge.consensus import blended
from regraft.merge.rule import REQUIRED, Copy, PerModel, Steps, Unit, rule
from regraft.merge.statistics import Gram, models, task_vectors
from regraft.methods import Options

_ABOUT_ZERO = 1e-8
_ROUNDING = 1e-7


class MultislerpOptions(Options):
    weight: PerModel[float] = Field((1.0,), description="weight of each model")
    normalize_weights: bool = Field(True, description="divide the weights by their sum")
    eps: float = Field(1e-8, gt=0, description="added to norms; directions whose mean is shorter cancel out")


@rule(
    summary="weighted mean of directions, with the weighted mean of norms",
    options=MultislerpOptions,
    takes_base=True,
    compiled=lambda _: True,
    mergekit_defaults={"weight": REQUIRED},
)
def multislerp(unit: Unit[MultislerpOptions]) -> Steps:
    o = unit.options
    if unit.n == 1:
        return Copy(0)
    total = sum(o.weight)
    if o.normalize_weights and abs(total) < _ABOUT_ZERO:
        unit.warn("the weights of multislerp add up to zero, so they were not normalised")
        total = 1.0
    weights = [w / total if o.normalize_weights else w for w in o.weight]
    (gram,) = yield [Gram(task_vectors if unit.has_base else models)]
    norms = np.sqrt(gram.diagonal()).tolist()
    shares = np.array([w / (norm + o.eps) for w, norm in zip(weights, norms, strict=True)])
    length = math.sqrt(max(float(shares @ gram @ shares), 0.0))
    unit.note(mean_direction=length)
    if length < max(o.eps, _ROUNDING):
        if max(norms) > o.eps:
            unit.warn(f"the directions of the models cancel out in {unit.name}; multislerp takes their average there")
        return blended(weights, unit.has_base)
    size = sum(w * norm for w, norm in zip(weights, norms, strict=True))
    return blended((shares * (size / length)).tolist(), unit.has_base)
