"""Nearswap against its formula, and its one promise."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import regraft.merge as merge

BASE = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
OTHER = BASE + 0.01 * torch.randn(50, 20, generator=torch.Generator().manual_seed(2))


def test_the_formula() -> None:
    a, b = BASE.double().numpy(), OTHER.double().numpy()
    weight = np.minimum(1, 0.005 / np.maximum(np.abs(a - b), 1e-6))
    found = merge.nearswap([OTHER], base=BASE, t=0.005)
    np.testing.assert_allclose(found.double().numpy(), weight * b + (1 - weight) * a, rtol=0, atol=5e-7)


@given(st.floats(0, 0.1))
def test_no_entry_moves_by_more_than_t(t: float) -> None:
    moved = (merge.nearswap([OTHER], base=BASE, t=t) - BASE).abs()
    assert moved.max() <= t + 5e-7


def test_a_large_t_is_the_other_model() -> None:
    torch.testing.assert_close(merge.nearswap([OTHER], base=BASE, t=10.0), OTHER, rtol=0, atol=5e-7)
