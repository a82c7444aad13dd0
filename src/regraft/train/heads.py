"""Modules that exist only while a model is trained, such as the projection of its features into another space.

They hang on the model under one name, so that the optimiser, clipping, the running mean, devices and wrappers for
distributed training take them for a part of it. A checkpoint keeps them in a file beside the model, which is written
without them, and the loop takes them off when it ends: what is saved is an ordinary model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

FILE = "training_heads.safetensors"
_NAME = "training_heads"


def attach(model: nn.Module, name: str, head: nn.Module) -> None:
    """Hang a module on a model, on the model's device and in its mode."""
    heads = model._modules.get(_NAME)
    if heads is None:
        heads = nn.ModuleDict()
        model.add_module(_NAME, heads)
    assert isinstance(heads, nn.ModuleDict)
    heads[name] = head.to(next(model.parameters()).device).train(model.training)


def attached(model: nn.Module, name: str) -> nn.Module:
    """The module that hangs on a model under a name."""
    heads = model._modules[_NAME]
    assert isinstance(heads, nn.ModuleDict)
    return heads[name]


def present(model: nn.Module) -> bool:
    """Whether a model has any."""
    return _NAME in model._modules


def remove(model: nn.Module) -> None:
    """Take all of them off."""
    model._modules.pop(_NAME, None)


@contextmanager
def without(model: nn.Module) -> Iterator[nn.Module | None]:
    """Within the context the model is without them; gives them, None if there are none."""
    heads = model._modules.pop(_NAME, None)
    try:
        yield heads
    finally:
        if heads is not None:
            model._modules[_NAME] = heads


def save(heads: nn.Module | None, folder: Path) -> None:
    """Write them into the folder of a checkpoint."""
    if heads is not None:
        save_file({name: value.contiguous() for name, value in heads.state_dict().items()}, folder / FILE)


def load(heads: nn.Module | None, folder: Path) -> None:
    """Give them the weights that a checkpoint has of them."""
    if heads is not None:
        heads.load_state_dict(load_file(folder / FILE))
