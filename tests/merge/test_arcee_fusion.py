"""Arcee Fusion against its formula over whole tensors, small ones and ones of many chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import regraft.merge as merge
from regraft.checkpoint.tensor import BLOCK


def importance(model: np.ndarray, base: np.ndarray) -> np.ndarray:
    def chances(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    p, q = chances(model), chances(base)
    return np.abs(model - base) * (p * np.log(p / q)).sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(30, 17), (300,), (6, 5, 7), (40, BLOCK // 4 + 1)])
def test_the_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    base = 0.05 * torch.randn(shape, generator=generator)
    model = base + 0.01 * torch.randn(shape, generator=generator) ** 3
    scores = importance(model.double().numpy(), base.double().numpy())
    ordered = np.sort(scores, axis=None)
    low, median, high = (ordered[int(q * (ordered.size - 1))] for q in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    found = merge.arcee_fusion([model], base=base, chunk=2 * BLOCK)
    assert ((found == model) | (found == base)).all()
    taken = (found == model).numpy()
    moved = (model != base).numpy()
    clear = moved & (np.abs(scores - threshold) > 1e-6 * threshold)  # float32 may see the others otherwise
    np.testing.assert_array_equal(taken[clear], (scores >= threshold)[clear])
    assert clear.mean() > 0.9
    assert 0.02 < taken.mean() < 0.5


def test_of_a_tensor_that_hardly_changed_every_change_is_taken() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, 20, generator=generator)
    model = base.clone()
    model[:9] += 0.1 * torch.randn(9, 20, generator=generator)
    assert torch.equal(merge.arcee_fusion([model], base=base), model)


@pytest.mark.parametrize("shape", [(70, BLOCK + 1), (40 * BLOCK, 1), (40 * BLOCK,)])
def test_the_sample_that_is_looked_at_first_does_not_cut_rows(shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = base * 1.01
    assert torch.equal(
        merge.arcee_fusion([model], base=base, chunk=BLOCK), merge.arcee_fusion([model], base=base, chunk=1 << 24)
    )
