"""The compiled loops give the bits of their torch twins, which accelerators run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint.dtypes import DTYPES as STORED
from regraft.checkpoint.dtypes import as_array, as_tensor, dtype_name
from regraft.checkpoint.tensor import BLOCK
from regraft.merge import kernels, random, selection, storage
from regraft.merge.rule import Chunk, TensorInfo
from regraft.merge.selection import OrderStatistic
from regraft.merge.statistics import Gram, models, task_vectors
from regraft.methods import Options

DTYPES = [torch.float32, torch.float64]
LENGTH = 3 * BLOCK + 1029  # no multiple of a tile or a block
ROWS = 4


def rows(dtype: torch.dtype, *, special: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn((ROWS, LENGTH), generator=generator, dtype=torch.float64) * 1e-3
    x[:, ::7] = 0.0
    x[1, ::14] = -0.0
    x[2] = x[0]  # equal entries, and sums that are exactly zero
    x[3, ::3] = -x[0, ::3]
    if special:
        x[0, 5], x[1, 6], x[2, 8] = math.nan, math.inf, -math.inf
    return x.to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integer = torch.int32 if a.dtype == torch.float32 else torch.int64
    nan = a.isnan() & b.isnan()
    return bool((nan | (a.view(integer) == b.view(integer))).all())


WEIGHTS = (0.5, -1.25, 0.0, 2.0)
CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "weighted_sum": lambda x: kernels.weighted_sum(x, WEIGHTS),
    "weighted_distance": lambda x: kernels.weighted_distance(x, x[1], WEIGHTS),
    "elect": lambda x: kernels.elect(x, (1.0, 0.5, 2.0, 1.0), False),
    "elect, normalised": lambda x: kernels.elect(x, (1.0, 0.5, 2.0, 1.0), True),
    "elect, negative weight": lambda x: kernels.elect(x, (1.0, -0.5, 2.0, 1.0), True),
    "winners": lambda x: torch.cat([kernels.winners(x)[0], kernels.winners(x)[1].unsqueeze(0)]),
    "changed": lambda x: kernels.changed(x[0], x[1], 0.3),
    "between": lambda x: kernels.between(x, [1e-4] * ROWS, [2e-3, math.inf, 1e-3, 1e-4]),
    "variance": kernels.variance,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_elementwise_loops_give_the_bits_of_torch(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(dtype)
    compiled = CALLS[name](x)
    monkeypatch.setattr(kernels, "fused", lambda *tensors: False)
    expected = CALLS[name](x)
    # A sum that starts from zero turns -0.0 into 0.0 in either of them.
    assert same_bits(compiled + 0.0, expected + 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_blocks_agree_with_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(dtype, special=False)
    calls = [
        lambda: kernels.block_sums(x, absolute=False),
        lambda: kernels.block_sums(x, absolute=True),
        lambda: kernels.block_grams(x),
    ]
    compiled = [call() for call in calls]
    counts = kernels.sign_conflicts(x), kernels.count_zeros(x).tolist()
    monkeypatch.setattr(kernels, "fused", lambda *tensors: False)
    for found, call in zip(compiled, calls, strict=True):
        expected = call()
        assert found.shape == expected.shape
        assert np.allclose(found, expected, rtol=1e-11, atol=1e-13)
    assert counts == (kernels.sign_conflicts(x), kernels.count_zeros(x).tolist())
    up, down = (x > 0).any(0), (x < 0).any(0)
    assert counts[0] == (int((up | down).sum()), int((up & down).sum()))


def chunk_of(rows: torch.Tensor, has_base: bool, start: int = 0) -> Chunk[Any]:
    return Chunk(TensorInfo("x", (LENGTH,)), Options(), start, rows, has_base, "F32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("anchor", [0, 1, 2])
@pytest.mark.parametrize("has_base", [False, True])
def test_mixtures_of_models_as_they_are_stored(
    dtype: torch.dtype, anchor: int, has_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = rows(torch.float32).to(dtype)
    weights = WEIGHTS[: ROWS - has_base]
    found = torch.from_numpy(kernels.mixture(chunk_of(raw, has_base), weights, anchor, of_changes=has_base))
    monkeypatch.setattr(kernels, "stored", lambda chunk: None)
    assert same_bits(found, kernels.mixture(chunk_of(raw, has_base), weights, anchor, of_changes=has_base))
    x = raw.double()
    origin = x[-1] if has_base else x[anchor]
    expected = x[anchor] + sum(w * (row - origin) for w, row in zip(weights, x, strict=False) if w)
    finite = expected.isfinite()
    assert torch.allclose(found[finite].double(), expected[finite], rtol=1e-5, atol=1e-9)
    assert bool((found.isfinite() == finite).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_of_models_as_they_are_stored(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = rows(torch.float32).to(dtype)
    found = torch.from_numpy(kernels.models_sum(chunk_of(raw, False), WEIGHTS))
    monkeypatch.setattr(kernels, "stored", lambda chunk: None)
    assert same_bits(found, kernels.models_sum(chunk_of(raw, False), WEIGHTS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_changes_on_a_base_as_they_are_stored(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = rows(torch.float32).to(dtype)
    found = torch.from_numpy(kernels.with_changes(chunk_of(raw, True), WEIGHTS[:-1]))
    with pytest.raises(ValueError, match="4 weights for 3 models"):
        kernels.with_changes(chunk_of(raw, True), WEIGHTS)
    monkeypatch.setattr(kernels, "stored", lambda chunk: None)
    assert same_bits(found, kernels.with_changes(chunk_of(raw, True), WEIGHTS[:-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("f", [models, task_vectors])
def test_inner_products_of_models_as_they_are_stored(dtype: torch.dtype, f: Any) -> None:
    raw = rows(torch.float32, special=False).to(dtype)
    has_base = f is task_vectors
    whole, cut = Gram(f), Gram(f)
    for statistic, step in ((whole, LENGTH), (cut, 2 * BLOCK)):
        statistic.begin(LENGTH)
        for start in range(0, LENGTH, step):
            statistic.observe(chunk_of(raw[:, start : start + step].contiguous(), has_base, start))
        assert statistic.finish()
    assert np.array_equal(whole.result, cut.result)
    values = raw[:-1].float() - raw[-1].float() if has_base else raw
    assert torch.allclose(torch.from_numpy(whole.result), values.double() @ values.double().T, rtol=1e-11)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_exact(stored: torch.dtype, dtype: torch.dtype) -> None:
    raw, base = rows(torch.float32, special=False).to(stored), rows(dtype, special=False)[3]
    for case in (raw, list(raw), [raw[0], raw[1].double()]):
        expected = torch.stack([row.to(dtype) for row in case])
        assert torch.equal(kernels.widened(case, dtype), expected)
        assert torch.equal(kernels.differences(case, base), expected - base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", DTYPES)
def test_narrowing_rounds_as_torch_does_and_says_what_leaves_the_range(dtype: torch.dtype, values: torch.dtype) -> None:
    x = rows(values)[0]
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 65519.0, 65520.0, 3.3895e38, 3.3896e38, math.inf])
    for case in (x, halves.to(values), x[100:], torch.tensor([1e-40, -0.0, 0.0], dtype=values)):
        found, within = storage.narrow(case, dtype_name(dtype))
        again, _ = storage.narrow(case.numpy(), dtype_name(dtype))
        assert np.array_equal(found.view(np.uint8), again.view(np.uint8))
        stored = as_tensor(found, dtype_name(dtype))
        expected = case.to(dtype)
        assert stored.dtype == dtype
        assert torch.equal(stored.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
        assert torch.equal(stored.isnan(), expected.isnan())
        assert torch.equal(torch.signbit(stored[~stored.isnan()]), torch.signbit(expected[~expected.isnan()]))
        narrower = torch.finfo(dtype).max < torch.finfo(values).max
        assert within == (not narrower or bool((case.abs().double() <= torch.finfo(dtype).max).all()))


@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2]),
    st.lists(st.floats(width=16), min_size=0, max_size=20),
    st.sampled_from([1.0, 0.3, 448.0, 65504.0, 3.38e38]),
)
def test_all_within_is_a_comparison_of_magnitudes(dtype: torch.dtype, values: list[float], limit: float) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert storage.all_within(as_array(x), dtype_name(dtype), limit) == bool((x.double().abs() <= limit).all())


@pytest.mark.parametrize("dtype", ["F16", "F32", "BF16"])
def test_a_limit_that_a_dtype_lacks_is_not_rounded(dtype: str) -> None:
    for limit in (0.3, 0.1, 1 / 3):
        near = torch.tensor([limit], dtype=torch.float64).to(STORED[dtype])
        around = [torch.nextafter(near, torch.full_like(near, far)) for far in (0.0, 1.0)]
        for value in (near, *around):
            assert storage.all_within(as_array(value), dtype, limit) == (float(value) <= limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 2**-16, 1 - 2**-20, 1.0])
def test_dropping_follows_the_mask_of_the_draws(dtype: torch.dtype, density: float) -> None:
    x = rows(dtype, special=False)[0]
    for start in (0, 4 * 777, 5):
        out = torch.empty_like(x)
        random.drop(x, density, 1.5, out, seed=3, model=1, name="w", start=start)
        keep = random.keep_mask(random.bits(3, 1, "w", start, LENGTH), density)
        assert torch.equal(out, torch.where(keep, x * 1.5, torch.zeros_like(x)))


def test_draws_whose_upper_half_is_that_of_the_bound_are_decided_by_the_lower() -> None:
    """Once in 65536 elements: enough of them here that the lower half matters for some."""
    x = torch.ones(1 << 21)
    density = 0.5 + 2**-17
    out = torch.empty_like(x)
    random.drop(x, density, 1.0, out, seed=0, model=0, name="w", start=0)
    draws = random.bits(0, 0, "w", 0, len(x))
    assert torch.equal(out > 0, random.keep_mask(draws, density))
    near = (draws >> 16) == 0
    assert 0 < int(out[near].sum()) < int(near.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 1029, 5000])
@pytest.mark.parametrize("divide", [False, True])
def test_dropping_by_rank_is_the_same_in_torch(
    dtype: torch.dtype, width: int, divide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rows(dtype, special=False)[0][: 7 * width]
    found, expected = torch.empty_like(x), torch.empty_like(x)
    options = {"divide": divide, "seed": 3, "model": 1, "name": "w", "start": 3 * width}
    random.drop_by_rank(x, width, 0.5, 0.2, found, **options)
    monkeypatch.setattr(random, "fused", lambda *tensors: False)
    random.drop_by_rank(x, width, 0.5, 0.2, expected, **options)
    assert torch.equal(found, expected)
    assert 0 < int((found != 0).sum()) < int((x != 0).sum()) or width < 3


def select(values: torch.Tensor, ranks: list[int], sample: torch.Tensor | None, absolute: bool) -> OrderStatistic:
    """`values` in chunks, after a look at `sample`; the statistic and the sweeps that it took."""
    statistic = OrderStatistic(lambda c: c.models, ranks=ranks, absolute=absolute)
    info, length = TensorInfo("x", (values.shape[1],)), values.shape[1]
    statistic.begin(length)
    if sample is not None:
        statistic.sample(Chunk(info, Options(), 0, sample))
    for sweep in range(1, 5):
        for start in range(0, length, 2 * BLOCK):
            statistic.observe(Chunk(info, Options(), start, values[:, start : start + 2 * BLOCK].contiguous()))
        if statistic.finish():
            statistic.took = sweep  # type: ignore[attr-defined]
            return statistic
    raise AssertionError("never finished")


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_a_good_sample_saves_a_sweep_and_a_bad_one_changes_nothing(
    absolute: bool, on_accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_accelerator:
        monkeypatch.setattr(selection, "fused", lambda *tensors: False)
    x = torch.cat([rows(torch.float32, special=False)] * 2, 1)
    ranks = [100, x.shape[1] // 2, x.shape[1] - 3]
    expected = (x.abs() if absolute else x).sort(1).values[:, ranks]
    for sample, sweeps in ((x[:, 3::16], 1), (None, 2), (torch.full((ROWS, 64), 1e9), 2)):
        found = select(x, ranks, sample, absolute)
        assert np.array_equal(found.result, expected)
        assert found.took <= 2  # type: ignore[attr-defined]
        if sweeps == 2 or absolute:  # the middle of signed values is zero, the tails need luck
            assert found.took >= sweeps  # type: ignore[attr-defined]
        values = x.abs() if absolute else x
        for row in range(ROWS):
            for i in range(len(ranks)):
                assert found.below[row, i] <= ranks[i] < found.upto[row, i]
                less = int((values[row] < expected[row, i]).sum())
                assert less <= found.below[row, i] <= less + int((values[row] == 0).sum())


def test_counts_of_a_thread_move_to_the_common_ones_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_FLUSH", 3 * BLOCK)
    x = torch.cat([rows(torch.float32, special=False)] * 2, 1)
    ranks = [x.shape[1] // 4]
    assert np.array_equal(select(x, ranks, None, True).result, x.abs().sort(1).values[:, ranks])
