"""One bit per entry, eight to a byte: signs, and marks of the entries that have a value stored.

Marks cost an eighth of a byte per entry of the tensor, positions of 32 bits four bytes per entry kept: marks are
smaller as soon as more than one entry in 32 is kept, which is where sparse deltas are of use, and no tensor is too long
for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def packed_size(numel: int) -> int:
    """Bytes for so many bits."""
    return -(-numel // 8)


def pack_mask(numel: int) -> int:
    """The bits of the last byte that belong to `numel` entries."""
    return (1 << ((numel - 1) % 8 + 1)) - 1


def pack(bits: Tensor) -> Tensor:
    """A flat boolean tensor as uint8; entry i is bit i % 8 of byte i // 8, and bits left over are 0."""
    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The first `numel` bits of what `pack` gave."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel, bitorder="little")).bool()
