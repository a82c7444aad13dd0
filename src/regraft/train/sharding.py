"""Weights, gradients and moments of the optimiser divided among processes: FSDP2 of torch, on GPUs or processors.

Each block of the model is a unit, found by its role, and what is left is one more: before a unit computes, its weights
are gathered from all processes, and let go afterwards. Modules keep their names and see whole tensors while they
compute, so that signals from inside are the same. The model that was given stays whole, in the memory of the processor;
a copy of it is divided, and what was learnt is put back for checkpoints and at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.axes.module_map import modules_of
from regraft.train import processes


def entire(value: Tensor) -> Tensor:
    """A tensor as a whole, where only a part of it is in this process; gradients go back to all parts."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Divided:
    """A model and its divided copy.

    Args:
        whole: a transformers model of a family with a table of modules.
        device: of this process.

    Attributes:
        model: the copy, which is to be trained.

    Raises:
        UserError: RG208 for a family without a table.
    """

    def __init__(self, whole: Any, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.whole = whole
        self.model = copy.deepcopy(whole).to(device)
        mesh = init_device_mesh(device.type, (processes.count(),))
        for blocks in modules_of(self.model).blocks.values():
            for name in blocks:
                fully_shard(self.model.get_submodule(name), mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def gather(self) -> None:
        """Put the weights into the whole model, in each process; all of them have to call it."""
        targets = dict(self.whole.named_parameters()) | dict(self.whole.named_buffers())
        with torch.no_grad():
            for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
                targets[name].copy_(entire(value))

    def scatter(self, weights: Mapping[str, Tensor]) -> None:
        """Put whole tensors, which all processes have, into the divided model, each process its part."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(part(weights[name], value))
            for name, value in self.model.named_buffers():
                if name in weights:
                    value.copy_(weights[name])

    def save_moments(self, optimizer: Any, folder: Path) -> None:
        """Write this process's part of the state of an optimiser."""
        torch.save(
            [{key: _local(value) for key, value in optimizer.state[p].items()} for p in _parameters(optimizer)],
            folder / f"moments-{processes.rank()}.pt",
        )

    def restore_moments(self, optimizer: Any, folder: Path) -> None:
        """Read it back, in the same process of as many."""
        kept = torch.load(folder / f"moments-{processes.rank()}.pt", weights_only=True, map_location="cpu")
        for parameter, state in zip(_parameters(optimizer), kept, strict=True):
            optimizer.state[parameter] = {key: _of_all(value, parameter) for key, value in state.items()}


def part(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as another one is."""
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = value.to(device=like.to_local().device, dtype=like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements)


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _local(value: Any) -> Any:
    return value.to_local().cpu() if hasattr(value, "to_local") else value


def _of_all(value: Any, parameter: Tensor) -> Any:
    """A part of a moment as what it is a part of; the number of steps is whole everywhere."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, Tensor) or value.ndim == 0 or not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
