"""The rows of all processes, for losses that compare the examples of a batch with one another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order; gradients reach those of this process alone.

    A loss of gathered rows is the same in every process, so what distributed training averages is one part of its
    gradient each: give it as `whole_gradient(loss)`.
    """
    if world() == 1:
        return rows
    own = rows.contiguous()
    count = torch.tensor([len(own)], device=own.device)
    counts = [torch.zeros_like(count) for _ in range(world())]
    dist.all_gather(counts, count)
    most = max(int(c) for c in counts)
    padded = torch.cat([own.detach(), own.new_zeros((most - len(own), *own.shape[1:]))])
    parts = [torch.zeros_like(padded) for _ in range(world())]
    dist.all_gather(parts, padded)
    pieces = [part[: int(c)] for part, c in zip(parts, counts, strict=True)]
    pieces[dist.get_rank()] = own
    return torch.cat(pieces)


def whole_gradient(loss: Tensor) -> Tensor:
    """The same value, with a gradient of which the mean over processes is that of one process with all rows."""
    if world() == 1:
        return loss
    return world() * loss - (world() - 1) * loss.detach()
