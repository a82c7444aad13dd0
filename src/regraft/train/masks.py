"""Which positions of a batch are real: padding never enters a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Stacks that read something else than the text that `attention_mask` belongs to.
_MASK_OF = {"decoder": "decoder_attention_mask", "vision": ""}


def mask_name(stack: str) -> str:
    """The entry of a batch that says which positions of a stack are real; "" if all of them are."""
    return _MASK_OF.get(stack, "attention_mask")


def valid(batch: Mapping[str, Any], stack: str, hidden: Tensor) -> Tensor | None:
    """The mask (B, T) of valid positions for signals (B, T, width) of a stack; None if all of them are."""
    name = mask_name(stack)
    mask = batch.get(name) if name else None
    if not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]:
        return None
    return mask.bool()


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of (B, T, ...) over valid positions and all further dimensions."""
    if mask is None:
        return values.mean()
    weights = mask.to(values.dtype)
    per_position = values.flatten(2).mean(-1) if values.ndim > 2 else values
    return (per_position * weights).sum() / weights.sum().clamp(min=1)
