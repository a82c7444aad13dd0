"""Which entries only one model changed, and which several did (RAM, arXiv:2601.13572): what the RAM rules share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from regraft.merge.rule import Chunk
from regraft.methods import Options, Paper

if TYPE_CHECKING:
    from torch import Tensor

RAM = Paper("Behavior Knowledge Merge in Reinforced Agentic Models", "Yuan et al.", "2026", "2601.13572")


class RamOptions(Options):
    epsilon: float = Field(1e-5, ge=0, description="changes of at most this size do not count as changes")


def parted(c: Chunk[Any]) -> tuple[Tensor, Tensor]:
    """Task vectors without what does not count as a change, (n, L), and how many models changed each entry, (L,)."""
    counts = c.deltas.abs() > c.options.epsilon
    return torch.where(counts, c.deltas, torch.zeros_like(c.deltas)), counts.sum(0)
