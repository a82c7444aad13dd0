"""TSV merging against the formula in NumPy, and what it gives for one model, equal models and orthogonal ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(41)
SHAPE = (14, 20)
BASE = torch.randn(SHAPE, generator=GENERATOR)
MODELS = [BASE + 0.05 * torch.randn(SHAPE, generator=GENERATOR) for _ in range(3)]


def orthonormal(x: np.ndarray) -> np.ndarray:
    """The polar factor by its definition, X (XᵀX)^(-1/2), for more rows than columns."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def merged(deltas: list[np.ndarray], kept: int) -> np.ndarray:
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas]
    left = orthonormal(np.concatenate([u[:, :kept] for u, _, _ in parts], 1))
    right = orthonormal(np.concatenate([v[:kept].T for _, _, v in parts], 1))
    sizes = np.concatenate([s[:kept] for _, s, _ in parts])
    return sum(size * np.outer(a, b) for size, a, b in zip(sizes, left.T, right.T, strict=True))


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
@pytest.mark.parametrize(("options", "kept"), [({}, 4), ({"rank_fraction": 0.15}, 2), ({"rank_fraction": 0.01}, 1)])
def test_the_formula(shape: tuple[int, int], options: dict[str, float], kept: int) -> None:
    base, *models = (x.view(shape) for x in (BASE, *MODELS))
    weights = [1.0, 0.5, -2.0]
    deltas = [w * (m.double() - base.double()).numpy() for w, m in zip(weights, models, strict=True)]
    expected = base.double().numpy() + 0.7 * merged(deltas, kept)
    found = merge.tsvm(models, base=base, weight=weights, **{"lambda": 0.7}, **options)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-6)
    exact = merge.tsvm([m.double() for m in models], base=base.double(), weight=weights, **{"lambda": 0.7}, **options)
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-13)


def test_one_model_comes_back_whole_or_cut_off() -> None:
    base, model = BASE.double(), MODELS[0].double()
    torch.testing.assert_close(merge.tsvm([model], base=base), model, rtol=0, atol=1e-15)
    left, sizes, right = np.linalg.svd((model - base).numpy(), full_matrices=False)
    cut = base.numpy() + (left[:, :7] * sizes[:7]) @ right[:7]
    np.testing.assert_allclose(merge.tsvm([model], base=base, rank_fraction=0.5).numpy(), cut, rtol=0, atol=1e-14)


def test_equal_models_are_counted_once() -> None:
    """Their directions are the same, and the complement that the decomposition makes up does not get in."""
    base, model = BASE.double(), MODELS[0].double()
    one = merge.tsvm([model], base=base, rank_fraction=0.5)
    torch.testing.assert_close(merge.tsvm([model] * 3, base=base, rank_fraction=0.5), one, rtol=0, atol=1e-13)
    twice = merge.tsvm([model] * 2, base=base, weight=[0.5, 1.5], rank_fraction=0.5)
    torch.testing.assert_close(twice, one, rtol=0, atol=1e-13)


def test_tasks_in_orthogonal_spaces_are_added() -> None:
    base = torch.zeros(9, 9, dtype=torch.float64)
    models = [base.clone() for _ in range(3)]
    for i, model in enumerate(models):
        model[3 * i : 3 * i + 3, 3 * i : 3 * i + 3] = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64)
    torch.testing.assert_close(merge.tsvm(models, base=base), sum(models), rtol=0, atol=1e-13)


def test_a_model_that_is_the_base_takes_no_part() -> None:
    found = merge.tsvm([MODELS[0], BASE], base=BASE, rank_fraction=1.0)
    torch.testing.assert_close(found, MODELS[0], rtol=0, atol=1e-6)


def test_fewer_rows_than_models() -> None:
    base = torch.zeros(2, 6, dtype=torch.float64)
    models = [torch.randn(2, 6, generator=GENERATOR, dtype=torch.float64) for _ in range(5)]
    found = merge.tsvm(models, base=base).numpy()
    assert found.any()
    assert np.linalg.svd(found)[1].max() <= max(np.linalg.norm(m, 2) for m in models) * (1 + 1e-12)
