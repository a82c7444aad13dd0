"""The counter-based generator: the same numbers however they are asked for, and they look random."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.merge.random import bits, keep_mask

N = 1 << 18


@given(st.integers(0, 1000), st.integers(1, 500))
def test_any_slice_is_a_slice_of_the_whole(start: int, length: int) -> None:
    whole = bits(7, 1, "w", 0, 2000)
    assert torch.equal(bits(7, 1, "w", start, length), whole[start : start + length])


def test_seed_model_and_name_all_matter() -> None:
    first = bits(0, 0, "w", 0, N)
    for other in (bits(1, 0, "w", 0, N), bits(0, 1, "w", 0, N), bits(0, 0, "v", 0, N)):
        # Independent draws agree in a bit half of the time: 6 sigma around N/2.
        agree = ((first ^ other) >= 0).sum().item()
        assert abs(agree - N / 2) < 6 * (N / 4) ** 0.5


def test_the_words_are_uniform() -> None:
    draws = bits(5, 2, "layer.weight", 0, N)
    for bit in range(32):
        ones = ((draws >> bit) & 1).sum().item()
        assert abs(ones - N / 2) < 6 * (N / 4) ** 0.5
    counts = torch.histc(draws.double(), 64, -(2.0**31), 2.0**31)
    chi2 = ((counts - N / 64) ** 2 / (N / 64)).sum().item()
    assert chi2 < 63 + 6 * (2 * 63) ** 0.5


def test_masks_keep_the_share_they_are_asked_for() -> None:
    draws = bits(1, 0, "w", 0, N)
    for density in (0.01, 0.1, 0.5, 0.9):
        kept = keep_mask(draws, density).sum().item()
        assert abs(kept - density * N) < 6 * (density * (1 - density) * N) ** 0.5
    assert keep_mask(draws, 1.0).all()
    assert not keep_mask(draws, 0.0).any()
