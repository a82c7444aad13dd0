"""Any slice of a tensor with a difference is the same slice of the whole, in any order and from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint import BLOCK, MemoryTensor
from regraft.checkpoint.delta_tensor import DeltaTensor, Parts
from regraft.checkpoint.packing import pack
from regraft.errors import UserError

SIZE = 2 * BLOCK + 1234  # whole blocks and a part of one


def parts(kind: str, marked: bool) -> tuple[torch.Tensor, Parts]:
    """What a tensor comes to, by definition, and what is stored of it."""
    generator = torch.Generator().manual_seed(1)
    base, delta = (torch.randn(SIZE, generator=generator) for _ in range(2))
    chosen = torch.rand(SIZE, generator=generator) < 0.1
    own = torch.randn(SIZE, generator=generator)
    stored = {"base": base}
    if kind == "bits":
        stored |= {"signs/x": pack(delta > 0), "scale/x": torch.tensor([0.25])}
        return base + 2 * torch.where(delta > 0, 0.25, -0.25), {n: MemoryTensor(n, t) for n, t in stored.items()}
    if kind == "dense":
        stored["delta/x"] = delta
        change = torch.where(chosen, own - base, delta) if marked else delta
    else:
        change = torch.where(chosen, delta, torch.zeros(()))
    if marked:
        stored |= {"marks/x": pack(chosen), "values/x": (own if kind == "dense" else delta)[chosen]}
    return base + 2 * change, {name: MemoryTensor(name, tensor) for name, tensor in stored.items()}


KINDS = [("dense", False), ("dense", True), ("sparse", True), ("bits", False)]
MADE = {pair: parts(*pair) for pair in KINDS}


@given(st.sampled_from(KINDS), st.integers(0, SIZE), st.integers(0, SIZE))
def test_slices(pair: tuple[str, bool], start: int, stop: int) -> None:
    wanted, stored = MADE[pair]
    source = DeltaTensor(stored["base"], stored, "x", torch.float32, pair[0], scale=2.0)
    assert torch.equal(source.read(start, stop), wanted[start : max(start, stop)])
    assert torch.equal(source.read(), wanted)


@pytest.mark.parametrize("pair", KINDS)
def test_threads(pair: tuple[str, bool]) -> None:
    wanted, stored = MADE[pair]
    source = DeltaTensor(stored["base"], stored, "x", torch.float32, pair[0], scale=2.0)
    starts = [*range(0, SIZE, 777)][::-1]
    with ThreadPoolExecutor(4) as pool:
        for start, piece in zip(starts, pool.map(lambda at: source.read(at, at + 777), starts), strict=True):
            assert torch.equal(piece, wanted[start : start + 777])


class Watched(MemoryTensor):
    """Notes how much is read at once."""

    def __init__(self, name: str, tensor: torch.Tensor, most: list[int]) -> None:
        super().__init__(name, tensor)
        self._most = most

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        found = super().read(start, stop)
        self._most.append(found.numel() * found.itemsize)
        return found


@pytest.mark.parametrize("pair", KINDS)
def test_a_slice_costs_a_slice(pair: tuple[str, bool]) -> None:
    """Of no part is more read at once than what is asked for, whatever the size of the tensor."""
    most: list[int] = []
    stored = {name: Watched(name, source.read(), most) for name, source in MADE[pair][1].items()}
    source = DeltaTensor(stored["base"], stored, "x", torch.float32, pair[0])
    for start in range(0, SIZE, BLOCK):
        source.read(start, start + BLOCK)
    assert max(most) <= 4 * BLOCK


@pytest.mark.parametrize(("count", "word"), [(-1, "fewer"), (1, "more")])
def test_values_that_are_not_as_many_as_marks(count: int, word: str) -> None:
    _, stored = MADE["sparse", True]
    values = stored["values/x"].read()
    values = values[:count] if count < 0 else torch.cat([values, values[:count]])
    source = DeltaTensor(
        stored["base"], {**stored, "values/x": MemoryTensor("v", values)}, "x", torch.float32, "sparse"
    )
    with pytest.raises(UserError, match=f"it has {word} values than marks") as caught:
        source.read(0, 5)
    assert caught.value.code == "RG112"
