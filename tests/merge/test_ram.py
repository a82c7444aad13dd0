"""The RAM rules entry by entry, and what they promise about changes that overlap and changes that do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import regraft.merge as merge

GENERATOR = torch.Generator().manual_seed(12)
BASE = torch.randn(40, 13, generator=GENERATOR)
CHANGES = [
    0.01 * torch.randn(40, 13, generator=GENERATOR) * (torch.rand(40, 13, generator=GENERATOR) < share)
    for share in (0.1, 0.3, 0.6)
]
MODELS = [BASE + change for change in CHANGES]


def entry_by_entry(factors: list[float], epsilon: float) -> np.ndarray:
    base = BASE.double().numpy()
    out = base.copy()
    for place in np.ndindex(base.shape):
        moved = [(i, float(m.double()[place]) - base[place]) for i, m in enumerate(MODELS)]
        moved = [(i, delta) for i, delta in moved if abs(delta) > epsilon]
        if len(moved) == 1:
            out[place] += factors[moved[0][0]] * moved[0][1]
        elif moved:
            out[place] += sum(delta for _, delta in moved) / len(moved)
    return out


@pytest.mark.parametrize("epsilon", [1e-5, 5e-3])
def test_ram(epsilon: float) -> None:
    found = merge.ram(MODELS, base=BASE, epsilon=epsilon)
    np.testing.assert_allclose(found.double().numpy(), entry_by_entry([1.0] * 3, epsilon), rtol=0, atol=5e-7)


@pytest.mark.parametrize(("r", "alpha", "epsilon"), [(0.1, 0.2, 1e-5), (0.5, 9.0, 5e-3)])
def test_ramplus_tl(r: float, alpha: float, epsilon: float) -> None:
    counts = np.stack([(m - BASE).double().numpy() for m in MODELS])
    counts = np.abs(counts) > epsilon
    shared = (counts & (counts.sum(0) > 1)).sum((1, 2))
    alone = (counts & (counts.sum(0) == 1)).sum((1, 2))
    factors = 1 + r * np.minimum(alpha, shared / alone)
    found = merge.ramplus_tl(MODELS, base=BASE, r=r, alpha=alpha, epsilon=epsilon)
    expected = entry_by_entry(factors.tolist(), epsilon)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=5e-7)


@given(st.integers(0, 2))
def test_changes_of_one_model_survive_whole(i: int) -> None:
    alone = (CHANGES[i].abs() > 1e-5) & (sum((c != 0).int() for c in CHANGES) == 1)
    found = merge.ram(MODELS, base=BASE)
    assert alone.any()
    torch.testing.assert_close(found[alone], MODELS[i][alone], rtol=0, atol=5e-7)


def test_changes_of_all_models_are_averaged() -> None:
    models = [BASE + 1, BASE + 2, BASE + 3]
    torch.testing.assert_close(merge.ram(models, base=BASE), merge.linear(models))
    assert torch.equal(merge.ramplus_tl(models, base=BASE), merge.ram(models, base=BASE))


def test_without_enlargement_ramplus_tl_is_ram() -> None:
    assert torch.equal(merge.ramplus_tl(MODELS, base=BASE, r=0), merge.ram(MODELS, base=BASE))
