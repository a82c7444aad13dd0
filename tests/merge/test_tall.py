"""TALL masks and consensus merging (tall_mask, tall_mask_ties, consensus_task_arithmetic, consensus_ties) in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import regraft.merge as merge
from regraft.errors import UserError

GENERATOR = torch.Generator().manual_seed(71)
SHAPES = {"w": (23, 17), "v": (90,)}
BASE = {name: torch.randn(shape, generator=GENERATOR) for name, shape in SHAPES.items()}
MODELS = [{k: v + 0.05 * torch.randn(v.shape, generator=GENERATOR) ** 3 for k, v in BASE.items()} for _ in range(4)]
WEIGHTS = [1.0, 0.5, 1.5, -0.4]
FACTORS = [0.2, 0.4, 0.6, 0.5]


def flat(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([state[name].double().numpy().ravel() for name in SHAPES])


T0, FINE_TUNES = flat(BASE), np.stack([flat(m) for m in MODELS])
DELTAS = FINE_TUNES - T0


def ties(deltas: np.ndarray, density: float) -> np.ndarray:
    """Trimmed over the whole model, weighted, and summed where the sign is that of the sum."""
    keep = max(1, math.floor(density * deltas.shape[1]))
    limits = np.sort(np.abs(deltas), 1)[:, -keep]
    weighted = np.where(np.abs(deltas) >= limits[:, None], deltas, 0) * np.array(WEIGHTS)[:, None]
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    return (weighted * (np.sign(weighted) == sign)).sum(0)


def vector(rule: str, density: float = 0.2) -> np.ndarray:
    return ties(DELTAS, density) if rule.endswith("ties") else np.array(WEIGHTS) @ DELTAS


def masks(merged: np.ndarray) -> np.ndarray:
    """As the paper has them, by distances between models."""
    multi = T0 + merged
    return np.abs(T0 - FINE_TUNES) > np.abs(multi - FINE_TUNES) * np.array(FACTORS)[:, None]


def check(found: dict[str, torch.Tensor], expected: np.ndarray) -> None:
    np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-6)


OPTIONS = {"weight": WEIGHTS, "tall_mask_lambda": FACTORS, "lambda": 0.8}


@pytest.mark.parametrize("rule", ["tall_mask", "tall_mask_ties"])
def test_a_task(rule: str) -> None:
    merged = vector(rule)
    for task, mask in enumerate(masks(merged)):
        assert 0.02 < mask.mean() < 0.98
        check(getattr(merge, rule)(MODELS, base=BASE, task=task, **OPTIONS), T0 + 0.8 * mask * merged)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("rule", ["consensus_task_arithmetic", "consensus_ties"])
def test_a_consensus(rule: str, k: int) -> None:
    merged = vector(rule)
    kept = masks(merged).sum(0) >= k
    check(getattr(merge, rule)(MODELS, base=BASE, k=k, **OPTIONS), T0 + 0.8 * kept * merged)


@pytest.mark.parametrize("rule", ["tall_mask_ties", "consensus_ties"])
def test_the_trim_has_an_option(rule: str) -> None:
    merged = vector(rule, 0.6)
    found = getattr(merge, rule)(MODELS, base=BASE, density=0.6, **OPTIONS)
    kept = masks(merged).sum(0) >= 2 if rule == "consensus_ties" else 1
    check(found, T0 + 0.8 * kept * merged)


def test_without_masks_they_are_the_rules_that_they_begin_with() -> None:
    plain = {"weight": WEIGHTS, "lambda": 0.8}
    summed = merge.task_arithmetic(MODELS, base=BASE, **plain)
    elected = merge.ties(MODELS, base=BASE, normalize=False, **plain)
    for found, expected in (
        (merge.tall_mask(MODELS, base=BASE, **plain), summed),
        (merge.consensus_task_arithmetic(MODELS, base=BASE, k=0, **plain), summed),
        (merge.tall_mask_ties(MODELS, base=BASE, **plain), elected),
        (merge.consensus_ties(MODELS, base=BASE, k=0, **plain), elected),
    ):
        check(found, flat(expected))


def test_one_model_comes_back() -> None:
    for rule in (merge.tall_mask, merge.tall_mask_ties):
        found = rule(MODELS[:1], base=BASE, task=0, **({"density": 1.0} if rule is merge.tall_mask_ties else {}))
        check(found, FINE_TUNES[0])


def test_a_task_is_nearer_to_its_fine_tune_than_the_sum() -> None:
    summed = flat(merge.task_arithmetic(MODELS, base=BASE))
    for task, own in enumerate(FINE_TUNES):
        found = flat(merge.tall_mask(MODELS, base=BASE, task=task))
        assert np.linalg.norm(found - own) < 0.5 * np.linalg.norm(summed - own)


def test_more_votes_than_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="no entry can be in 3 masks of 2 tasks") as error:
        merge.consensus_ties(MODELS[:2], base=BASE, k=3)
    assert error.value.code == "RG303"
    with pytest.raises(UserError, match="takes 2 or more") as error:
        merge.consensus_task_arithmetic(MODELS[:1], base=BASE)
    assert error.value.code == "RG305"
    with pytest.raises(UserError, match="task is 2, and there are 2 models"):
        merge.tall_mask(MODELS[:2], base=BASE, task=2)
