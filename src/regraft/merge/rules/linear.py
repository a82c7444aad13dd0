"""Weighted average of models; with equal weights the uniform model soup.

    θ = Σ wᵢ θᵢ / Σ wᵢ        (normalize: true)
    θ = Σ wᵢ θᵢ               (normalize: false)

Use it for fine-tunes of one initialisation on one task with different hyper-parameters, seeds or data orders (a soup),
and for models along one lineage (base, continued pre-training, chat). It needs no base. Averages only make sense
between models that stayed in one basin: runs from different random initialisations average to noise.

Weights that add up to 1, by themselves or by normalisation, are applied as θ₁ + Σ ŵᵢ (θᵢ − θ₁), so that equal tensors
come back bit for bit. A model with weight 0 has no say, even where it is not finite; if one model has all the weight,
its tensors are copied and the others are not read. In a mergekit recipe `weight` must be given, as there; weights that
add up to zero cannot be normalised and are used as they are, with a warning (mergekit divides by zero).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from regraft.merge.kernels import mixture, weighted_sum
from regraft.merge.rule import REQUIRED, Chunk, Combine, Copy, PerModel, Unit, rule
from regraft.methods import Options, Paper


class LinearOptions(Options):
    weight: PerModel[float] = Field((1.0,), description="weight of each model")
    normalize: bool = Field(True, description="divide by the sum of the weights")


@rule(
    summary="weighted average of the models (uniform soup)",
    options=LinearOptions,
    papers=[
        Paper(
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing"
            " inference time",
            "Wortsman et al.",
            "ICML 2022",
            "2203.05482",
            28,
        )
    ],
    mergekit_defaults={"weight": REQUIRED},
)
def linear(unit: Unit[LinearOptions]) -> Combine | Copy:
    weights = unit.options.weight
    total = sum(weights)
    normalized = unit.options.normalize and abs(total) >= 1e-8
    if unit.options.normalize and not normalized:
        unit.warn("the weights of linear add up to zero, so they were not normalised")
    share = [w / total for w in weights] if normalized else list(weights)
    active = [i for i, w in enumerate(share) if w != 0]
    if len(active) == 1 and share[active[0]] == 1:
        return Copy(active[0])
    anchored = bool(active) and (normalized or total == 1)

    def combine(c: Chunk[LinearOptions]) -> Tensor:
        if not anchored:
            return weighted_sum(c.models, share)
        return mixture(c, share, active[0])

    return combine
