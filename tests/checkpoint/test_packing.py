"""Bits in bytes: what goes in comes out, cut at any byte, and the file's order is that of the documentation."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.checkpoint.packing import pack, packed_size, unpack


@given(st.lists(st.booleans(), max_size=200))
def test_unpacking_undoes_packing(bits: list[bool]) -> None:
    packed = pack(torch.tensor(bits, dtype=torch.bool))
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(len(bits))
    assert unpack(packed, len(bits)).tolist() == bits


@given(st.lists(st.booleans(), max_size=200), st.integers(0, 25))
def test_slices_at_bytes_are_slices_of_the_whole(bits: list[bool], cut: int) -> None:
    cut = min(cut * 8, len(bits))
    parts = [pack(torch.tensor(part, dtype=torch.bool)) for part in (bits[: cut // 8 * 8], bits[cut // 8 * 8 :])]
    assert torch.equal(torch.cat(parts), pack(torch.tensor(bits, dtype=torch.bool)))


@given(st.lists(st.booleans(), min_size=1, max_size=64))
def test_entry_i_is_bit_i_mod_8_of_byte_i_div_8(bits: list[bool]) -> None:
    packed = pack(torch.tensor(bits, dtype=torch.bool)).tolist()
    assert [bool(packed[i // 8] >> (i % 8) & 1) for i in range(len(bits))] == bits
    assert sum(byte.bit_count() for byte in packed) == sum(bits)
