"""What the engine asks of torch itself: whether it is there, where it computes, and in how many threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from regraft.merge.jobs import on_processor

if TYPE_CHECKING:
    import torch


def torch_is_loaded() -> bool:
    """Whether torch was imported, and not just put off."""
    return "torch._C" in sys.modules


def accelerator(device: str | None) -> torch.device | None:
    """The device of that name, None for the processor."""
    if device is None or on_processor(device):
        return None
    import torch

    return torch.device(device)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Parallelism comes from the workers; a kernel that splits its own work would change the order of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
