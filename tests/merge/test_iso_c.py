"""Iso-C against the formula in NumPy, and its spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(42)
SHAPE = (14, 20)
BASE = torch.randn(SHAPE, generator=GENERATOR)
MODELS = [BASE + 0.05 * torch.randn(SHAPE, generator=GENERATOR) for _ in range(3)]


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_the_formula(shape: tuple[int, int]) -> None:
    """U Vᵀ is M (MᵀM)^(-1/2), and the mean of the singular values the nuclear norm over their number."""
    base, *models = (x.view(shape) for x in (BASE, *MODELS))
    weights = [1.0, 0.5, -2.0]
    deltas = [w * (m.double() - base.double()).numpy() for w, m in zip(weights, models, strict=True)]
    tall = sum(deltas) if shape[0] > shape[1] else sum(deltas).T
    values, vectors = np.linalg.eigh(tall.T @ tall)
    flat = np.sqrt(values).mean() * tall @ (vectors / np.sqrt(values)) @ vectors.T
    expected = base.double().numpy() + 0.7 * (flat if shape[0] > shape[1] else flat.T)
    found = merge.iso_c(models, base=base, weight=weights, **{"lambda": 0.7})
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)
    exact = merge.iso_c([m.double() for m in models], base=base.double(), weight=weights, **{"lambda": 0.7})
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-12)


def test_all_singular_values_are_their_mean() -> None:
    base = BASE.double()
    models = [m.double() for m in MODELS]
    before = np.linalg.svd((sum(models) - 3 * base).numpy())[1]
    after = np.linalg.svd((merge.iso_c(models, base=base) - base).numpy())[1]
    np.testing.assert_allclose(after, before.mean(), rtol=1e-12)


def test_equal_models_are_one_model_so_many_times_as_long() -> None:
    base, model = BASE.double(), MODELS[0].double()
    one = merge.iso_c([model], base=base, **{"lambda": 3.0})
    torch.testing.assert_close(merge.iso_c([model] * 3, base=base), one, rtol=0, atol=1e-12)


def test_rows_that_no_model_touched_stay() -> None:
    models = [m.clone() for m in MODELS]
    for model in models:
        model[5:9] = BASE[5:9]
    found = merge.iso_c(models, base=BASE)
    torch.testing.assert_close(found[5:9], BASE[5:9], rtol=0, atol=1e-7)
    sizes = np.linalg.svd((sum(models) - 3 * BASE).double().numpy())[1]
    after = np.linalg.svd((found - BASE).double().numpy())[1]
    np.testing.assert_allclose(after[:10], sizes.sum() / 14, rtol=1e-4)
