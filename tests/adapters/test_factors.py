"""Truncated decompositions against numpy, and the algebra of products."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regraft.adapters import factors as module
from regraft.adapters.factors import Factors, Truncation, added, decompose, recompress, residual, rounding_noise
from regraft.errors import UserError

sizes = st.integers(1, 12)
seeds = st.integers(0, 1000)


def noise(m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def product(one: Factors) -> Tensor:
    return one.up.double() @ one.down.double()


@given(sizes, sizes, st.integers(1, 12), seeds)
def test_a_rank_leaves_what_the_other_singular_values_hold(m: int, n: int, rank: int, seed: int) -> None:
    matrix = noise(m, n, seed)
    found = decompose(matrix, Truncation(rank=rank))
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert found.rank == min(rank, m, n)
    lost = float(np.sum(values[found.rank :] ** 2))
    assert float((matrix - product(found)).square().sum()) == pytest.approx(lost, rel=1e-9, abs=1e-20)
    assert residual(matrix, found) == pytest.approx(lost, rel=1e-9, abs=1e-20)


@given(sizes, sizes, st.integers(1, 3), seeds)
def test_a_matrix_of_low_rank_comes_back(m: int, n: int, rank: int, seed: int) -> None:
    matrix = noise(m, rank, seed) @ noise(rank, n, seed + 1)
    found = decompose(matrix, Truncation(rank=12))
    assert found.rank <= min(rank, m, n)
    torch.testing.assert_close(product(found), matrix, rtol=1e-9, atol=1e-9)


@given(sizes, sizes, seeds)
def test_the_error_falls_with_the_rank(m: int, n: int, seed: int) -> None:
    matrix = noise(m, n, seed)
    errors = [residual(matrix, decompose(matrix, Truncation(rank=rank))) for rank in range(1, min(m, n) + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-20


@given(st.floats(0.05, 1.0), seeds)
def test_energy_takes_the_fewest_values_that_keep_it(energy: float, seed: int) -> None:
    matrix = noise(9, 7, seed)
    squares = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    kept = np.cumsum(squares) / squares.sum()
    found = decompose(matrix, Truncation(energy=energy))
    assert kept[found.rank - 1] >= energy * (1 - 1e-9)
    assert found.rank == 1 or kept[found.rank - 2] < energy
    assert decompose(matrix, Truncation(energy=energy, max_rank=2)).rank <= 2


def test_both_factors_have_entries_of_one_size() -> None:
    found = decompose(1e6 * noise(20, 30, 0), Truncation(rank=5))
    assert float(found.up.norm()) == pytest.approx(float(found.down.norm()))


def test_large_matrices_by_the_range_finder_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = noise(300, 400, 0, torch.float32) + 3 * noise(300, 4, 1, torch.float32) @ noise(4, 400, 2, torch.float32)
    exact = residual(matrix, decompose(matrix, Truncation(rank=8)))
    monkeypatch.setattr(module, "EXACT_UP_TO", 100)
    asked = []
    monkeypatch.setattr(
        module, "_leading", lambda m, width, inner=module._leading: asked.append(width) or inner(m, width)
    )
    found = decompose(matrix, Truncation(rank=8))
    assert asked == [40]
    assert residual(matrix, found) == pytest.approx(exact, rel=0.01)
    again = decompose(matrix, Truncation(rank=8))
    assert torch.equal(found.up, again.up)
    # Where the range finder would have to find a large part of the matrix, all of it is decomposed.
    decompose(matrix, Truncation(rank=100))
    assert len(asked) == 2


weights = st.lists(st.floats(-2, 2), min_size=1, max_size=4)


@given(weights, seeds)
def test_side_by_side_is_the_sum(weights: list[float], seed: int) -> None:
    parts = [Factors(noise(6, i + 1, seed + i), noise(i + 1, 5, seed + 50 + i)) for i in range(len(weights))]
    expected = sum(w * product(one) for w, one in zip(weights, parts, strict=True))
    found = added(zip(weights, parts, strict=True))
    if found is None:
        assert not any(weights)
        return
    assert found.rank == sum(i + 1 for i, w in enumerate(weights) if w)
    torch.testing.assert_close(product(found), expected, rtol=1e-12, atol=1e-12)


@given(weights, seeds)
def test_products_with_one_down_are_summed_in_their_up(weights: list[float], seed: int) -> None:
    down = noise(2, 5, seed)
    parts = [Factors(noise(6, 2, seed + 1 + i), down) for i in range(len(weights))]
    found = added(zip(weights, parts, strict=True))
    if found is not None:
        assert found.rank == 2
        expected = sum(w * product(one) for w, one in zip(weights, parts, strict=True))
        torch.testing.assert_close(product(found), expected, rtol=1e-12, atol=1e-12)


def test_what_cancels_is_nothing() -> None:
    one = Factors(noise(4, 2, 0), noise(2, 3, 1))
    assert added([(1.0, one), (-1.0, one)]) is None
    assert added([(1.0, Factors(torch.zeros(4, 2), one.down))]) is None


@given(st.integers(1, 6), seeds)
def test_a_product_is_compressed_as_its_matrix_would_be(rank: int, seed: int) -> None:
    long = Factors(noise(9, 6, seed), noise(6, 8, seed + 1))
    found = recompress(long, Truncation(rank=rank))
    assert found.rank == rank
    torch.testing.assert_close(product(found), product(decompose(product(long), Truncation(rank=rank))))


def test_rounding_is_below_its_bound() -> None:
    for dtype in (torch.float32, torch.float64):
        stored = noise(60, 80, 3) * 0.02
        rounded = stored.to(dtype).double() - stored
        bound = rounding_noise(float(stored.square().sum()), (60, 80), dtype)
        assert float(torch.linalg.matrix_norm(rounded, 2)) < bound
    assert rounding_noise(1.0, (60, 80), torch.bfloat16) == 0
    assert rounding_noise(1.0, (1, 1), torch.float32) == pytest.approx(2**-24 * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rank": 0}, "rank is 0: give a whole number from 1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"energy": 0.5, "max_rank": 0}, "max_rank is 0"),
        ({"energy": 0.0}, "energy is 0.0: give a share above 0 and up to 1"),
        ({"energy": 1.1}, "energy is 1.1"),
        ({"energy": math.nan}, "energy is nan"),
        ({"energy": 0.9, "rank": 3}, "both rank and energy are given: give one of them"),
        ({"max_rank": 3}, "max_rank is given without energy"),
    ],
)
def test_impossible_truncations(given: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        Truncation(**given)  # type: ignore[arg-type]
    assert caught.value.code == "RG303"
    assert str(caught.value).startswith(sentence)
