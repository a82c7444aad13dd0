"""What several experiments and models of the zoo have in common."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from torch import Tensor

transformers.utils.logging.disable_progress_bar()

State = dict[str, Tensor]


def example(folder: str, name: str) -> ModuleType:
    """A module of an example. The examples are scripts that stand alone, so their folders are no packages."""
    path = str(Path(__file__).parents[1] / "examples" / folder)
    if path not in sys.path:
        sys.path.append(path)
    return importlib.import_module(name)


def best(tries: Sequence[Mapping[str, Any]], score: Callable[..., float]) -> tuple[dict[str, Any], float]:
    """The options with the highest score among some tries, the first of equals, and that score."""
    scored = [(score(**options), options) for options in tries]
    top = max(value for value, _ in scored)
    return next((dict(options), value) for value, options in scored if value == top)


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of some options' values."""
    combinations: list[dict[str, Any]] = [{}]
    for name, entries in values.items():
        combinations = [{**before, name: entry} for before in combinations for entry in entries]
    return combinations


def flat(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    """The task vector of a model as one vector."""
    return torch.cat([(state[name] - base[name]).flatten() for name in base if base[name].is_floating_point()])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a, b) / (a.norm() * b.norm()))
