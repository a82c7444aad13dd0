"""The rules that draw, over a million entries: density, expectation and norm are those of mergekit's algorithm.

Draws differ, so distributions are compared. The reference is written here from the published algorithm, with torch's
own generator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regraft.merge as merge
from distribution import likeness, shared_error
from regraft.merge.rule import Rule
from regraft.methods import methods

RULES: list[Rule] = [rule for rule in methods("merge") if "seed" in rule.options.model_fields]
SHAPE = (1000, 1000)
DENSITY, EPSILON, WEIGHT = (0.3, 0.6), (0.15, 0.2), (1.0, 0.7)
# Standard errors. Among some thousand comparisons of a distribution with itself, one beyond it is a rare accident.
LIMIT = 5.5


@pytest.fixture(scope="module")
def deltas() -> Tensor:
    """Two task vectors that agree in half of their direction."""
    common, *own = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(31))
    return 0.01 * torch.stack([common + x for x in own])


def chances(delta: Tensor, density: float, epsilon: float | None) -> Tensor:
    """With what probability each entry is kept: one for all, or rising with the rank of its size in its row."""
    if epsilon is None:
        return torch.full(SHAPE, density, dtype=torch.float64)
    ranks = delta.abs().argsort(dim=1).argsort(dim=1).double()
    return density - epsilon + 2 * epsilon * ranks / (SHAPE[1] - 1)


def reference(deltas: Tensor, rule: str, rescale: str, normalize: bool, seed: int, density: Any = DENSITY) -> Tensor:
    """The merged task vector: sparsify, make up for it, weigh, elect signs or not."""
    generator = torch.Generator().manual_seed(seed)
    weighted = []
    for i, delta in enumerate(deltas.double()):
        p = chances(delta, density[i], EPSILON[i] if rule.startswith("della") else None)
        kept = delta * torch.bernoulli(p, generator=generator)
        factor = {"l1": delta.abs().sum() / kept.abs().sum(), "none": 1.0}.get(rescale, 1 / p)
        weighted.append(WEIGHT[i] * factor * kept)
    stacked, weights = torch.stack(weighted), torch.tensor(WEIGHT, dtype=torch.float64).view(-1, 1, 1)
    if rule in ("dare_linear", "della_linear"):
        return stacked.sum(0) / (weights.sum() if normalize else 1)
    agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    divisor = (weights * agree).sum(0)
    return (stacked * agree).sum(0) / (torch.where(divisor == 0, 1, divisor) if normalize else 1)


def merged(deltas: Tensor, rule: str, rescale: str, normalize: bool) -> Tensor:
    options = {"density": DENSITY, "weight": WEIGHT, "rescale": rescale, "normalize": normalize, "seed": 17}
    if rule.startswith("della"):
        options["epsilon"] = EPSILON
    return getattr(merge, rule)(list(deltas), base=torch.zeros(SHAPE), **options)


def factor_error(deltas: Tensor, rule: str, rescale: str) -> float:
    """Of the less exact of the two models' factors, if there are any."""
    if rescale != "l1":
        return 0.0
    epsilons = EPSILON if rule.startswith("della") else (None, None)
    return max(shared_error(x, chances(x, d, e)) for x, d, e in zip(deltas, DENSITY, epsilons, strict=True))


def test_these_are_the_rules() -> None:
    assert [rule.name for rule in RULES] == ["dare_linear", "dare_ties", "della", "della_linear"]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", ["l1", "none", "exact"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_the_distribution_is_that_of_the_algorithm(rule: Rule, rescale: str, normalize: bool, deltas: Tensor) -> None:
    own_word = "probability" if rule.name.startswith("della") else "density"
    ours = merged(deltas, rule.name, own_word if rescale == "exact" else rescale, normalize)
    theirs = reference(deltas, rule.name, rescale, normalize, 5)
    found = likeness(ours.flatten(), theirs.flatten(), deltas.flatten(1), factor_error(deltas, rule.name, rescale))
    assert [(one.quantity, one.sigmas) for one in found if one.sigmas > LIMIT] == []


@pytest.mark.parametrize(
    ("off", "what"), [("density", "density"), ("epsilon", "density"), ("factor", "mean size (L1)")]
)
def test_another_distribution_would_be_found_out(off: str, what: str, deltas: Tensor) -> None:
    """One per cent more entries, a flat probability, or a factor that is two per cent too large."""
    ours = merged(deltas, "della_linear", "none", False)
    rule = "dare_linear" if off == "epsilon" else "della_linear"
    density = tuple(1.01 * d for d in DENSITY) if off == "density" else DENSITY
    theirs = reference(deltas, rule, "none", False, 5, density) * (1.02 if off == "factor" else 1)
    found = likeness(ours.flatten(), theirs.flatten(), deltas.flatten(1), 0.0)
    assert {one.quantity: one.sigmas for one in found}[what] > LIMIT
