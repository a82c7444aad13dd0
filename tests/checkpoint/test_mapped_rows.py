"""Rows gathered from several tensors: the same elements as by indexing, however they are read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from regraft.checkpoint import MemoryTensor, TensorSource, open_checkpoint
from regraft.checkpoint.mapped_rows import AVERAGE, MEAN, ZERO, MappedRows, RowMap, common_dtype
from regraft.checkpoint.tensor import read_rows

ORIGIN = [0, 0, 0, 1, ZERO, ZERO, MEAN, 1, 0, MEAN, AVERAGE, AVERAGE]
ROW = [2, 3, 4, 0, 4, 5, 0, 5, 0, 1, 10, 11]
MEANS = [[(0, 1), (1, 2)], [(0, 0), (1, 0), (1, 5)]]
TOKENS = 10


def row_map() -> RowMap:
    return RowMap(np.array(ORIGIN, dtype=np.int32), np.array(ROW, dtype=np.int64), MEANS, TOKENS)


def expected(tensors: list[torch.Tensor], axis: int) -> torch.Tensor:
    """By hand, row by row, in float64."""
    views = [t.double().movedim(axis, 0) for t in tensors]
    rows = []
    for origin, row in zip(ORIGIN[:TOKENS], ROW[:TOKENS], strict=True):
        if origin == ZERO:
            rows.append(torch.zeros_like(views[0][0]))
        elif origin == MEAN:
            rows.append(sum(views[i][r] for i, r in MEANS[row]) / len(MEANS[row]))
        else:
            rows.append(views[origin][row])
    rows = [row.to(tensors[0].dtype).double() for row in rows]
    rows += [torch.stack(rows).mean(0)] * (len(ORIGIN) - TOKENS)
    return torch.stack(rows).movedim(0, axis)


def tensors(axis: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 4, generator=generator).movedim(0, axis).contiguous().to(dtype) for n in (5, 6)]


def mapped(given: list[torch.Tensor], axis: int) -> MappedRows:
    sources = [MemoryTensor("t", t) for t in given]
    return MappedRows("t", sources, row_map(), axis=axis, dtype=common_dtype(sources))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_those_of_indexing(axis: int, dtype: torch.dtype) -> None:
    given = tensors(axis, dtype)
    source = mapped(given, axis)
    wanted = expected(given, axis)
    assert isinstance(source, TensorSource)
    assert source.shape == tuple(wanted.shape)
    assert source.dtype == dtype
    torch.testing.assert_close(source.read().view(source.shape), wanted.to(dtype))


@pytest.mark.parametrize("axis", [0, 1, 2])
@given(cuts=st.lists(st.integers(0, 144), max_size=6))
def test_cuts_do_not_matter(axis: int, cuts: list[int]) -> None:
    source = mapped(tensors(axis), axis)
    edges = [0, *sorted(cuts), 144]
    pieces = [mapped(tensors(axis), axis).read(a, b) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), source.read())


def test_other_dtypes_are_widened() -> None:
    one, other = tensors(0, torch.bfloat16)[0], tensors(0, torch.float16)[1]
    source = mapped([one, other], 0)
    assert source.dtype == torch.float32
    wanted = torch.cat([one[2:5].float(), other[:1].float()])
    assert torch.equal(source.read(0, 48).view(4, 3, 4), wanted)


def test_runs_are_read_as_runs_and_without_a_copy(tmp_path: Path) -> None:
    save_file({"t": torch.arange(5000.0).view(1000, 5)}, tmp_path / "model.safetensors")
    file = open_checkpoint(str(tmp_path)).tensors["t"]
    calls = []

    class Counted:
        name, shape, dtype = file.name, file.shape, file.dtype

        def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
            raise AssertionError("read_into is there")

        def read_into(self, out: np.ndarray, start: int) -> None:
            calls.append((start, len(out)))
            file.read_into(out, start)  # type: ignore[attr-defined]

    order = np.r_[500:1000, 0:500]
    source = MappedRows("t", [Counted()], RowMap(np.zeros(1000, dtype=np.int32), order), axis=0, dtype=file.dtype)
    (row,) = read_rows([source], 0, 5000).tensor  # type: ignore[union-attr]
    assert torch.equal(row.view(1000, 5), torch.arange(5000.0).view(1000, 5)[torch.as_tensor(order)])
    assert calls == [(2500, 2500), (0, 2500)]


def test_an_identity_is_known_as_one() -> None:
    same = RowMap(np.ones(4, dtype=np.int32), np.arange(4))
    assert same.is_identity(1, 4)
    assert not same.is_identity(0, 4)
    assert not same.is_identity(1, 5)
    assert not RowMap(np.ones(4, dtype=np.int32), np.array([0, 1, 3, 2])).is_identity(1, 4)
