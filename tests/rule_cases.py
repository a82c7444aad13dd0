"""Every registered rule, new ones included, and small models that each can merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint.tensor import BLOCK
from regraft.merge.rule import Rule
from regraft.methods import methods

RULES: list[Rule] = methods("merge")
NAMES = [rule.name for rule in RULES]
TASK_VECTOR_RULES = [rule.name for rule in RULES if rule.needs_base]
LAYERS = 5


def count(rule: Rule, n: int) -> int:
    return min(max(n, rule.min_models), rule.max_models or n)


def state(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """A small model with layers, so that rules about layers work, and one tensor of several chunks."""

    def draw(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    named = {f"model.layers.{i}.w": draw(9, 7) for i in range(LAYERS)}
    return {"model.embed.weight": draw(3 * BLOCK // 64 + 5, 64), **named, "model.norm.weight": draw(13)}


def family(seed: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    base = state(generator, dtype)
    models = []
    for _ in range(n):
        change = state(generator, scale=0.05)
        models.append({name: (value.float() + change[name]).to(dtype) for name, value in base.items()})
    return base, models


# What of a rule's work depends on options: (rule, options that lead elsewhere than the defaults).
BRANCHES: dict[str, list[dict[str, Any]]] = {
    "linear": [{"normalize": False}],
    "task_arithmetic": [{"normalize": True}],
    "ties": [{"rescale": True, "trim_scope": "tensor"}, {"density": 1.0, "normalize": False}],
    "dare_linear": [{"rescale": "l1"}],
    "dare_ties": [{"rescale": "none", "normalize": True}],
    "della": [{"rescale": "l1"}, {"rescale": "none", "normalize": False}],
    "breadcrumbs": [{"rescale": True, "density": 0.5, "gamma": 0.1}],
    "breadcrumbs_ties": [{"rescale": True, "density": 0.5, "gamma": 0.1, "normalize": True}],
    "model_stock": [{"filter_wise": True}],
    "sce": [{"select_topk": 0.3}],
    "pcb": [{"inter": "normsum"}, {"inter": "pairwise", "scope": "tensor"}, {"formula": "paper"}],
    "passthrough": [{"scale": 0.3}],
    "multislerp": [{"normalize_weights": False}],
    "ramplus_tl": [{"epsilon": 1e-2, "alpha": 0.9}],
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "layer_swap": [{"match_magnitude": True}],
    "emr": [{"task": 1}, {"task": 0, "rescaler": "tensor_means"}],
    "tall_mask": [{"task": 1}],
    "tall_mask_ties": [{"task": 1, "density": 0.5}],
    "consensus_task_arithmetic": [{"k": 1}],
    "consensus_ties": [{"k": 1, "density": 0.5}],
}


def assert_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float = 1e-6) -> None:
    """Equal to a unit in the last place and `within`, but for one entry in 10,000, which last bits of sums decide."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        off = (value.double() - expected[name].double()).abs()
        last_place = value.double().abs() * torch.finfo(value.dtype).eps * 2
        assert int((off > last_place + within).sum()) <= value.numel() * 1e-4, name
