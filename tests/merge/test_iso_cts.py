"""Iso-CTS against the steps of the paper in NumPy, and what it gives for equal models and at the ends of its option."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(43)
SHAPE = (14, 20)
BASE = torch.randn(SHAPE, generator=GENERATOR)
MODELS = [BASE + 0.05 * torch.randn(SHAPE, generator=GENERATOR) for _ in range(3)]


def whitened(x: np.ndarray) -> np.ndarray:
    """X (XᵀX)^(-1/2), for more rows than columns, or as many."""
    values, vectors = np.linalg.eigh(x.T @ x)
    return x @ (vectors / np.sqrt(values)) @ vectors.T


def merged(deltas: list[np.ndarray], common: int, own: int) -> np.ndarray:
    u, s, v = np.linalg.svd(sum(deltas))
    lefts, rights, sizes = [u[:, :common]], [v[:common].T], [s[:common]]
    for delta in deltas:
        outside = (np.eye(len(u)) - lefts[0] @ lefts[0].T) @ delta
        u_own, s_own, v_own = np.linalg.svd(outside)
        lefts, rights = [*lefts, u_own[:, :own]], [*rights, v_own[:own].T]
        sizes.append(s_own[:own])
    return np.concatenate(sizes).mean() * whitened(np.hstack(lefts)) @ whitened(np.hstack(rights)).T


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
@pytest.mark.parametrize(("options", "common", "own"), [({}, 11, 1), ({"common_space_fraction": 0.4}, 5, 3)])
def test_the_formula(shape: tuple[int, int], options: dict[str, float], common: int, own: int) -> None:
    base, *models = (x.view(shape) for x in (BASE, *MODELS))
    weights = [1.0, 0.5, -2.0]
    deltas = [w * (m.double() - base.double()).numpy() for w, m in zip(weights, models, strict=True)]
    expected = base.double().numpy() + 0.7 * merged(deltas, common, own)
    found = merge.iso_cts(models, base=base, weight=weights, **{"lambda": 0.7}, **options)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-5)
    exact = [m.double() for m in models]
    found = merge.iso_cts(exact, base=base.double(), weight=weights, **{"lambda": 0.7}, **options)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_all_in_common_is_iso_c() -> None:
    base, models = BASE.double(), [m.double() for m in MODELS]
    found = merge.iso_cts(models, base=base, common_space_fraction=1.0)
    torch.testing.assert_close(found, merge.iso_c(models, base=base), rtol=0, atol=1e-12)


def test_equal_models_have_no_directions_of_their_own_but_the_next_ones() -> None:
    """What the common space of 11 leaves of each is the same: its direction counts once, its size three times."""
    base, model = BASE.double(), MODELS[0].double()
    u, s, v = np.linalg.svd((model - base).numpy(), full_matrices=False)
    size = 3 * s[:11].sum() + 3 * s[11]
    expected = base.numpy() + size / 14 * u[:, :12] @ v[:12]
    np.testing.assert_allclose(merge.iso_cts([model] * 3, base=base).numpy(), expected, rtol=0, atol=1e-12)


def test_what_rounding_leaves_of_a_task_is_no_direction() -> None:
    """All of one matrix of rank 3 lies in the common space."""
    base = BASE.double()
    thin = torch.randn(14, 3, generator=GENERATOR, dtype=torch.float64)
    change = thin @ torch.randn(3, 20, generator=GENERATOR, dtype=torch.float64)
    found = merge.iso_cts([base + change, base + 2 * change], base=base) - base
    sizes = np.linalg.svd(found.numpy())[1]
    np.testing.assert_allclose(sizes[:3], 3 * np.linalg.svd(change.numpy())[1].sum() / 14, rtol=1e-9)
    assert sizes[3:].max() < 1e-12


def test_more_models_than_directions() -> None:
    """Five over nine is rounded to one direction each, which is more than there are."""
    base = torch.zeros(5, 8, dtype=torch.float64)
    models = [torch.randn(5, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(9)]
    found = merge.iso_cts(models, base=base, common_space_fraction=0.0)
    torch.testing.assert_close(found, merge.iso_c(models, base=base), rtol=0, atol=1e-12)
