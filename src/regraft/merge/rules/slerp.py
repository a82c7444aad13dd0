"""Spherical interpolation between two models: along the arc instead of the chord, tensor by tensor.

    cos θ = ⟨a, b⟩ / (‖a‖ ‖b‖)
    result = sin((1−t)θ)/sin θ · a + sin(tθ)/sin θ · b

Each tensor is flattened; the norms of a and b are kept, not equalised. If |cos θ| > 0.9995 the result is the linear
interpolation (1−t) a + t b. Siblings that differ by less than about 3 % of their norm are always that close, so that
slerp *is* linear there; the lineage file says for each tensor which branch ran. A tensor of zeros has no direction and
counts as perpendicular to the other, as in mergekit.

Use it to blend two models along one lineage, such as a general chat model and its domain-tuned successor. `t` may be a
gradient over depth and differ by tensor: the study on continued pre-training and merging in materials science
(arXiv:2409.03444) uses [0, 0.5, 0.3, 0.7, 1] for attention, [1, 0.5, 0.7, 0.3, 0] for feed-forward layers and 0.5
elsewhere. The first model is a (t = 0); a recipe may name it as `base`, as mergekit's do.
"""

from __future__ import annotations

import math

from pydantic import Field

from regraft.merge.kernels import mixture, models_sum
from regraft.merge.rule import REQUIRED, Copy, Steps, Unit, rule
from regraft.merge.statistics import Gram, models
from regraft.methods import Options, Paper

THRESHOLD = 0.9995
_EPSILON = 1e-8


class SlerpOptions(Options):
    t: float = Field(0.5, description="place on the arc: 0 is the first model, 1 the second")


@rule(
    summary="spherical interpolation between two models",
    options=SlerpOptions,
    min_models=2,
    max_models=2,
    base_first=True,
    compiled=lambda _: True,
    mergekit_defaults={"t": REQUIRED},
    papers=[
        Paper(
            "Fine-tuning large language models for domain adaptation: exploration of training strategies, scaling,"
            " model merging and synergistic capabilities",
            "Lu, Luu, Buehler",
            "npj Computational Materials 2025",
            "2409.03444",
            16,
        ),
        Paper("Animating rotation with quaternion curves", "Shoemake", "SIGGRAPH 1985"),
    ],
)
def slerp(unit: Unit[SlerpOptions]) -> Steps:
    t = unit.options.t
    if t == 0:
        return Copy(0)
    if t == 1:
        return Copy(1)
    if not 0 < t < 1:
        unit.warn(f"slerp extrapolates: t is {t}, outside [0, 1]")
    (gram,) = yield [Gram(models)]
    norms = [math.sqrt(gram[i, i]) for i in (0, 1)]
    cosine = float(gram[0, 1])
    for norm in norms:
        if norm > _EPSILON:
            cosine /= norm
    linear = abs(cosine) > THRESHOLD
    unit.note(branch="linear" if linear else "spherical", cosine=cosine)
    if linear:
        if cosine < 0:
            unit.warn(f"{unit.name} points in opposite directions in the two models, so that they cancel out")
        return lambda c: mixture(c, (1 - t, t), 0)
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return lambda c: models_sum(c, (first, second))
