"""Learning rates along a run, as factors of the highest one; and rates that fall from the head to the input."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from torch import nn

from regraft.axes.module_map import modules_of
from regraft.errors import UserError

Kind: TypeAlias = Literal["cosine", "linear", "constant", "constant_with_cooldown"]


def factor(kind: Kind, step: int, total: int, *, warmup: int = 0, cooldown: int = 0, floor: float = 0.0) -> float:
    """What the learning rate is multiplied by at a step (the first is 0).

    Args:
        kind: "cosine" and "linear" fall from the end of the warm-up to the end of the run; "constant" does not fall;
            "constant_with_cooldown" falls linearly in the last `cooldown` steps.
        total: steps of the run.
        warmup: first steps, in which the factor rises linearly; none of them is 0, which would be a step for nothing.
        floor: what it falls to.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = max(total - warmup, 1)
    done = min((step - warmup) / left, 1.0)
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if kind == "linear":
        return floor + (1 - floor) * (1 - done)
    if kind == "constant_with_cooldown" and cooldown and step > total - cooldown:
        return floor + (1 - floor) * max(total - step, 0) / cooldown
    return 1.0


def parameter_groups(model: nn.Module, rate: float, decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimiser: matrices decay, biases, norms and other vectors do not.

    Args:
        rate: the highest learning rate.
        decay: weight decay of matrices.
        layer_decay: the rate of a block is that of the block above it times this; the last block's is `rate` times
            this, and embeddings come below the first block. What is outside the blocks and no embedding has `rate`.

    Raises:
        UserError: RG208 for layer-wise rates of a family without a table of modules.
    """
    roles = modules_of(model) if layer_decay != 1.0 else None
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if roles is not None and (found := roles.depth(name)) is not None:
            stack, block = found
            depth = len(roles.blocks[stack]) if stack in roles.blocks else max(map(len, roles.blocks.values()))
            scale = layer_decay ** (depth - (block if block is not None else -1))
        groups.setdefault((scale, decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    if not groups:
        raise UserError("RG309", "the model has no parameter to train", fix="unfreeze a part of it")
    return [{"params": ps, "lr": rate * scale, "weight_decay": d} for (scale, d), ps in groups.items()]
