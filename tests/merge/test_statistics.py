"""Statistics of a stream against whole-tensor computations, for any cutting into chunks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.rule import Chunk, TensorInfo
from regraft.merge.statistics import ColumnSums, Gram, MinMax, OrderStatistic, Sum
from regraft.methods import Options


def collect(statistic, values: torch.Tensor, chunk: int, reverse: bool = False) -> torch.Tensor:
    """Feed `values` (rows, L) in chunks, as often as the statistic wants."""
    length = values.shape[1]
    info = TensorInfo("x", (length,))
    statistic.begin(length)
    for _ in range(8):
        starts = list(range(0, length, chunk))
        for start in reversed(starts) if reverse else starts:
            piece = Chunk(info, Options(), start, values[:, start : start + chunk].contiguous())
            statistic.observe(piece)
        if statistic.finish():
            return torch.from_numpy(statistic.result)
    raise AssertionError("never finished")


LENGTH = 5 * BLOCK + 777


def samples(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((3, LENGTH), generator=generator, dtype=torch.float64) * 1e-3
    x[1] = x[1].sign() * x[1].abs() ** 0.2
    x[2, : LENGTH // 2] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_equal_a_full_sort(dtype: torch.dtype) -> None:
    x = samples(dtype)
    ranks = [0, 1, 17, LENGTH // 3, LENGTH - 2, LENGTH - 1]
    expected = x.sort(1).values[:, ranks]
    for chunk in (BLOCK, 4 * BLOCK, 8 * BLOCK):
        assert torch.equal(collect(OrderStatistic(lambda c: c.models, ranks=ranks), x, chunk, reverse=True), expected)


def test_order_statistics_take_ranks_per_row() -> None:
    x = samples()
    ranks = [[5], [LENGTH - 1], [LENGTH // 2]]
    expected = torch.stack([row.sort().values[r] for row, r in zip(x, ranks, strict=True)])
    assert torch.equal(collect(OrderStatistic(lambda c: c.models, ranks=ranks), x, 2 * BLOCK), expected)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
def test_small_tensors_are_sorted_exactly(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor([values])
    rank = data.draw(st.integers(0, len(values) - 1))
    assert collect(OrderStatistic(lambda c: c.models, ranks=[rank]), x, BLOCK).item() == sorted(values)[rank]


def test_infinities_and_negative_zero_keep_their_order() -> None:
    x = torch.zeros((1, 2**17))
    x[0, :5] = torch.tensor([math.inf, -math.inf, -0.0, -1.5, 2.5])
    found = collect(OrderStatistic(lambda c: c.models, ranks=[0, 1, 2, 2**17 - 2, 2**17 - 1]), x, 4 * BLOCK)
    assert found.tolist() == [[-math.inf, -1.5, 0.0, 2.5, math.inf]]


def test_sums_do_not_depend_on_the_cutting_and_are_accurate() -> None:
    x = samples() + 1e4
    results = [
        collect(Sum(lambda c: c.models), x, k * BLOCK, reverse)
        for k, reverse in itertools.product((1, 2, 5, 9), (False, True))
    ]
    assert all(torch.equal(r, results[0]) for r in results)
    exact = torch.tensor([math.fsum(row.tolist()) for row in x], dtype=torch.float64)
    torch.testing.assert_close(results[0], exact, rtol=1e-12, atol=0)


def test_gram_matrices_do_not_depend_on_the_cutting_and_are_accurate() -> None:
    x = samples()
    results = [collect(Gram(lambda c: c.models), x, k * BLOCK) for k in (1, 3, 9)]
    assert all(torch.equal(r, results[0]) for r in results)
    torch.testing.assert_close(results[0], x.double() @ x.double().T, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("width", [1, 7, 1009, BLOCK, BLOCK + 3, 3 * BLOCK + 1])
def test_column_sums_do_not_depend_on_the_cutting_and_are_accurate(width: int) -> None:
    x = samples()[:, : LENGTH // width * width].contiguous()
    results = [
        collect(ColumnSums(lambda c: c.models, width), x, k * BLOCK, reverse)
        for k, reverse in itertools.product((1, 2, 9), (False, True))
    ]
    assert all(torch.equal(r, results[0]) for r in results)
    torch.testing.assert_close(results[0], x.double().view(3, -1, width).sum(1), rtol=1e-12, atol=1e-15)


def test_column_sums_keep_what_comes_too_early() -> None:
    """The engine reads the next chunk into the memory of the last one."""
    x = samples()[:, : 3 * BLOCK]
    statistic = ColumnSums(lambda c: c.models, 64)
    statistic.begin(3 * BLOCK)
    memory = torch.empty(3, BLOCK)
    for start in (2 * BLOCK, BLOCK, 0):
        memory[:] = x[:, start : start + BLOCK]
        statistic.observe(Chunk(TensorInfo("x", (3 * BLOCK,)), Options(), start, memory))
    assert statistic.finish()
    torch.testing.assert_close(
        torch.from_numpy(statistic.result), x.double().view(3, -1, 64).sum(1), rtol=1e-12, atol=1e-15
    )


def test_extremes() -> None:
    x = samples()
    expected = torch.stack([x.amin(1), x.amax(1)], 1)
    assert torch.equal(collect(MinMax(lambda c: c.models), x, BLOCK, reverse=True), expected)
