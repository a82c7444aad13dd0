"""One bit per entry (BitDelta, arXiv:2402.10193): what deltas that are stored so and merges of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def takes_bits(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is worth a bit per entry and a scale: biases and norms are not."""
    return len(shape) > 1


def rises(delta: Tensor) -> Tensor:
    """The bit of each entry: whether it is above 0."""
    return delta > 0


def stepped(up: Tensor, scale: Tensor) -> Tensor:
    """Entries from their bits: the scale up or down, there is no third value."""
    return torch.where(up, scale, -scale)
