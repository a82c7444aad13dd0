"""Spherical interpolation with weights: between two models, or between their changes to a base.

    t = w₂ / (w₁ + w₂),   cos θ = ⟨a, b⟩ / (‖a‖ ‖b‖)
    result = sin((1−t)θ)/sin θ · a + sin(tθ)/sin θ · b

Without a base a and b are the models. With one they are the task vectors, and the result is added to the base: the
angle between task vectors is wide even where that between the models is next to none. `nuslerp_flatten: true` takes one
angle per tensor; false takes one per run along the last axis, or, with `nuslerp_row_wise: true`, one per run along the
first axis (the names are mergekit's).

Use it like `slerp`: with a base, or when weights are easier to think of than a place on the arc. Where a and b point in
the same or in opposite directions (sin θ below 1e-6) the interpolation is linear; zeros have no direction and count as
perpendicular. Weights that add up to zero mean t = 0.5, as in mergekit. If one model has all the weight, its tensors
are copied. In a mergekit recipe `weight` must be given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field

from regraft.merge.consensus import blended, changed, of_runs
from regraft.merge.rule import REQUIRED, Chunk, Copy, PerModel, Steps, Unit, rule
from regraft.merge.statistics import ColumnSums, Gram, RowSums, models, task_vectors
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 1e-12  # of sin² θ
_ROUNDING = 1e-12
_ABOUT_ZERO = 1e-6
_EPSILON = 1e-7
_PAIRS = [0, 0, 1], [0, 1, 1]


class NuslerpOptions(Options):
    weight: PerModel[float] = Field((1.0,), description="weight of each model; only their ratio counts")
    nuslerp_flatten: bool = Field(True, description="one angle per tensor")
    nuslerp_row_wise: bool = Field(
        False, description="without nuslerp_flatten: angles along the first axis of a tensor instead of the last"
    )


@rule(
    summary="spherical interpolation between two models or their task vectors, by weights",
    options=NuslerpOptions,
    rows_beside=4,
    min_models=2,
    max_models=2,
    takes_base=True,
    compiled=lambda o: o.nuslerp_flatten,
    mergekit_defaults={"weight": REQUIRED},
    papers=[Paper("Animating rotation with quaternion curves", "Shoemake", "SIGGRAPH 1985")],
)
def nuslerp(unit: Unit[NuslerpOptions]) -> Steps:
    o, (info,) = unit.options, unit.infos
    total = sum(o.weight)
    t = 0.5 if abs(total) < _ABOUT_ZERO else o.weight[1] / total
    if t in (0, 1):
        return Copy(int(t))
    if not 0 < t < 1:
        unit.warn(f"nuslerp extrapolates: its weights mean t = {t}, outside [0, 1]")
    vectors = task_vectors if unit.has_base else models
    if o.nuslerp_flatten or len(info.shape) < 2:
        (gram,) = yield [Gram(vectors)]
        near, far = _coefficients(unit, gram[_PAIRS][:, None], t)
        return blended((float(near[0]), float(far[0])), unit.has_base)
    first, second = _PAIRS

    def products(c: Chunk[NuslerpOptions]) -> Tensor:
        rows = c.deltas if unit.has_base else c.models
        return rows[first] * rows[second]

    width = info.width if o.nuslerp_row_wise else info.shape[-1]
    (sums,) = yield [(ColumnSums if o.nuslerp_row_wise else RowSums)(products, width)]
    near, far = _coefficients(unit, sums, t)
    excess = near + far - 1
    excess[abs(excess) < _ROUNDING] = 0  # so that equal entries come back bit for bit

    def spread(values: np.ndarray, c: Chunk[NuslerpOptions]) -> Tensor:
        if not o.nuslerp_row_wise:
            return of_runs(values, c, width)
        places = torch.arange(c.start, c.start + c.length, device=c.device) % width
        found: Tensor = c.like(values)[places]
        return found

    def combine(c: Chunk[NuslerpOptions]) -> Tensor:
        if unit.has_base:
            return changed(c.base, spread(near, c) * c.deltas[0] + spread(far, c) * c.deltas[1])
        a, b = c.models[0], c.models[1]
        return changed(a, spread(excess, c) * a + spread(far, c) * (b - a))

    return combine


def _coefficients(unit: Unit[NuslerpOptions], products: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the two vectors, (k,) each, from ⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩, (3, k)."""
    norms = np.maximum(np.sqrt(products[[0, 2]]), _EPSILON)
    cosine = np.clip(products[1] / norms[0] / norms[1], -1, 1)
    unit.note(cosine=float(cosine.mean()))
    parallel = 1 - cosine**2 <= _PARALLEL
    if bool((parallel & (cosine < 0)).any()):
        unit.warn(f"{unit.name} points in opposite directions in the two models, so that they cancel out")
    angle = np.arccos(np.where(parallel, 0.0, cosine))
    near, far = (np.sin(share * angle) / np.sin(angle) for share in (1 - t, t))
    return np.where(parallel, 1 - t, near), np.where(parallel, t, far)
