"""Adapter sources: the same bits however a range is cut, and the arithmetic against plain matrix products."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.checkpoint.lora import AddedVector, LoraTensor, Renamed, ReplacedRows, ScaledTensor
from regraft.checkpoint.tensor import BLOCK, MemoryTensor, TensorSource, numel


def source(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> MemoryTensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + sum(shape))
    return MemoryTensor(name, torch.randn(*shape, generator=generator).to(dtype))


def lora(rows: int, cols: int, rank: int, *, transposed: bool, dora: bool, dtype: torch.dtype) -> LoraTensor:
    out, inputs = (cols, rows) if transposed else (rows, cols)
    down, up = source("down", rank, inputs), source("up", out, rank)
    magnitude = source("magnitude", out) if dora else None
    return LoraTensor(source("w", rows, cols, dtype=dtype), down, up, 0.5, transposed=transposed, magnitude=magnitude)


MAKERS: dict[str, Callable[[torch.dtype], TensorSource]] = {
    "linear": lambda dtype: lora(300, 700, 8, transposed=False, dora=False, dtype=dtype),
    "linear, dora": lambda dtype: lora(300, 700, 8, transposed=False, dora=True, dtype=dtype),
    "transposed": lambda dtype: lora(700, 300, 5, transposed=True, dora=False, dtype=dtype),
    "transposed, dora": lambda dtype: lora(700, 300, 5, transposed=True, dora=True, dtype=dtype),
    "wide": lambda dtype: lora(3, 70_001, 4, transposed=False, dora=True, dtype=dtype),
    "narrow": lambda dtype: lora(70_001, 3, 2, transposed=True, dora=True, dtype=dtype),
    "on another": lambda dtype: LoraTensor(
        lora(300, 700, 8, transposed=False, dora=True, dtype=dtype), source("d2", 3, 700), source("u2", 300, 3), 2.0
    ),
    "rows replaced": lambda dtype: ReplacedRows(
        source("w", 900, 200, dtype=dtype), source("new", 3, 200, dtype=dtype), [800, 0, 401]
    ),
    "scaled rows": lambda dtype: ScaledTensor(source("w", 900, 200, dtype=dtype), source("s", 900), by_row=True),
    "scaled columns": lambda dtype: ScaledTensor(source("w", 900, 200, dtype=dtype), source("s", 200), by_row=False),
    "added": lambda dtype: AddedVector(source("b", 70_000, dtype=dtype), source("c", 70_000), 0.3),
    "renamed": lambda dtype: Renamed(source("b", 70_000, dtype=dtype), "x"),
}
WHOLE: dict[tuple[str, torch.dtype], tuple[TensorSource, torch.Tensor]] = {}


def whole(name: str, dtype: torch.dtype) -> tuple[TensorSource, torch.Tensor]:
    if (name, dtype) not in WHOLE:
        made = MAKERS[name](dtype)
        WHOLE[name, dtype] = made, made.read()
    return WHOLE[name, dtype]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, 14), max_size=6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_cuts_at_blocks_change_no_bit(name: str, cuts: set[int], dtype: torch.dtype) -> None:
    made, expected = whole(name, dtype)
    edges = [0, *(cut * BLOCK for cut in sorted(cuts) if cut * BLOCK < numel(made)), numel(made)]
    pieces = [made.read(start, stop) for start, stop in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_threads_and_odd_cuts_change_no_bit(name: str) -> None:
    expected = whole(name, torch.float32)[1]
    fresh = MAKERS[name](torch.float32)
    edges = [*range(0, numel(fresh), 9_973), numel(fresh)]
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(fresh.read, edges, edges[1:]))
    assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("name", ["linear", "transposed, dora", "wide", "narrow"])
def test_the_number_of_torch_threads_changes_no_bit(name: str) -> None:
    expected = whole(name, torch.float32)[1]
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(MAKERS[name](torch.float32).read(), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arithmetic(transposed: bool, dora: bool, dtype: torch.dtype) -> None:
    made = lora(130, 70, 6, transposed=transposed, dora=dora, dtype=dtype)
    out, inputs = (70, 130) if transposed else (130, 70)
    w = source("w", 130, 70, dtype=dtype).read().view(130, 70).double()
    up, down = source("up", out, 6).read().view(out, 6), source("down", 6, inputs).read().view(6, inputs)
    delta = 0.5 * up.double() @ down.double()
    expected = w + (delta.T if transposed else delta)
    if dora:
        dim = 0 if transposed else 1
        norm = expected.norm(dim=dim, keepdim=True)
        expected = expected / norm * source("magnitude", out).read().double().view(norm.shape)
    tolerance = 1e-14 if dtype == torch.float64 and not dora else 2e-6
    got = made.read().view(130, 70)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_ranges_behave_as_in_slicing() -> None:
    made, expected = whole("linear", torch.float32)
    assert torch.equal(made.read(210_000 - 5), expected[-5:])
    assert torch.equal(made.read(10, 10**9), expected[10:])
    assert made.read(7, 7).shape == (0,)


def test_an_empty_tensor() -> None:
    made = LoraTensor(
        MemoryTensor("w", torch.empty(0, 4)), source("d", 2, 4), MemoryTensor("u", torch.empty(0, 2)), 1.0
    )
    assert made.read().shape == (0,)
