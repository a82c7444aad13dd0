"""Model Stock: between the base and the average of fine-tunes, at the place that the angle between them suggests.

    t = N cos θ / (1 + (N − 1) cos θ),   θ = θ₀ + t · mean(δᵢ)

with cos θ the mean cosine between pairs of task vectors, per tensor: fine-tunes that agree are followed, fine-tunes
that point in different directions are averaged back towards the base. Use it for a few fine-tunes of one base on one
task, instead of a soup of many. `filter_wise` takes the angle per row (last axis) of each tensor instead of per
tensor.

The paper gives the formula for equal pairwise angles; as in mergekit, unequal ones are averaged, and products of two
norms below 1e-6 count as 1e-6, so that tensors which hardly move stay near the base. A denominator that is not positive
(mean cosine at or below −1/(N−1)) has no meaning: the base is kept, with a warning (mergekit extrapolates).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from regraft.merge.consensus import added, blended, changed, of_runs
from regraft.merge.rule import Steps, Unit, rule
from regraft.merge.statistics import Gram, RowSums, task_vectors
from regraft.methods import Options, Paper


class ModelStockOptions(Options):
    filter_wise: bool = Field(False, description="one angle per row of a tensor instead of one per tensor")


@rule(
    summary="towards the average of fine-tunes, as far as they agree",
    options=ModelStockOptions,
    needs_base=True,
    min_models=2,
    compiled=lambda o: not o.filter_wise,
    papers=[
        Paper("Model Stock: All we need is just a few fine-tuned models", "Jang et al.", "ECCV 2024", "2403.19522")
    ],
)
def model_stock(unit: Unit[ModelStockOptions]) -> Steps:
    n = unit.n
    pairs = [(i, j) for i in range(n) for j in range(i, n)]
    shape = unit.infos[0].shape
    if unit.options.filter_wise and len(shape) > 1:
        width = shape[-1]
        first, second = (list(side) for side in zip(*pairs, strict=True))
        (sums,) = yield [RowSums(lambda c: c.deltas[first] * c.deltas[second], width)]
        products = {pair: sums[k] for k, pair in enumerate(pairs)}
    else:
        width = max(unit.numel, 1)
        (gram,) = yield [Gram(task_vectors)]
        products = {(i, j): gram[i : i + 1, j] for i, j in pairs}
    norms = [np.sqrt(products[i, i]) for i in range(n)]
    cosines = [np.clip(products[i, j] / np.maximum(norms[i] * norms[j], 1e-6), -1, 1) for i, j in pairs if i != j]
    cosine = np.stack(cosines).mean(0)
    below = 1 + (n - 1) * cosine
    t = np.where(below > 1e-6, n * cosine / np.maximum(below, 1e-6), 0.0)
    if bool((below <= 1e-6).any()):
        unit.warn(f"the models pull {unit.name} in opposite directions; model_stock keeps the base there")
    if bool((t < 0).any()):
        unit.warn(
            "the models point away from one another in some tensors; model_stock moves against them there (t < 0)"
        )
    unit.note(t=float(t.mean()), cosine=float(cosine.mean()))
    if len(t) == 1:
        return blended([float(t[0]) / n] * n, has_base=True)

    return lambda c: changed(c.base, added(c.deltas) / n * of_runs(t, c, width))
