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

from collections.abc import Sequence

from pydantic import Field

from regraft.merge.kernels import mixture, models_sum
from regraft.merge.rule import REQUIRED, Combine, Copy, PerModel, Unit, rule
from regraft.methods import Options, Paper


class LinearOptions(Options):
    weight: PerModel[float] = Field((1.0,), description="weight of each model")
    normalize: bool = Field(True, description="divide by the sum of the weights")


def _shares(options: LinearOptions) -> tuple[list[float], bool, bool]:
    """What each model counts; whether that was normalised; whether the shares add up to 1."""
    weights = options.weight
    total = sum(weights)
    normalized = options.normalize and abs(total) >= 1e-8
    share = [w / total for w in weights] if normalized else list(weights)
    return share, normalized, any(share) and (normalized or total == 1)


def _combination(options: LinearOptions) -> Sequence[float] | None:
    share, _, whole = _shares(options)
    return share if whole else None


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
    compiled=lambda _: True,
    combination=_combination,
    mergekit_defaults={"weight": REQUIRED},
)
def linear(unit: Unit[LinearOptions]) -> Combine | Copy:
    share, normalized, anchored = _shares(unit.options)
    if unit.options.normalize and not normalized:
        unit.warn("the weights of linear add up to zero, so they were not normalised")
    active = [i for i, w in enumerate(share) if w != 0]
    if len(active) == 1 and share[active[0]] == 1:
        return Copy(active[0])

    if not anchored:
        return lambda c: models_sum(c, share)
    return lambda c: mixture(c, share, active[0])
