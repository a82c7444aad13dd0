"""The models: a small vision transformer trained on upright digits, and one fine-tune of it per skill.

Each expert is trained on its own skill and, for half of its batches, on upright digits again: what it forgets of the
base it cannot bring to a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from skills import BASE, Images, Split

BATCH = 64


@dataclass(frozen=True)
class Scale:
    """How much is trained: `full` is the demo, `smoke` only shows that everything runs."""

    images: int | None
    width: int
    layers: int
    base_epochs: int
    expert_epochs: int


SCALES = {"full": Scale(None, 128, 2, 40, 12), "smoke": Scale(600, 32, 1, 30, 10)}


def build(scale: Scale, seed: int) -> transformers.ViTForImageClassification:
    """A vision transformer for 8 x 8 images in four patches, with names for its ten labels."""
    names = {i: str(i) for i in range(10)}
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=scale.width,
        intermediate_size=2 * scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=4,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(config)


def train(
    model: transformers.ViTForImageClassification,
    data: Split,
    variants: Sequence[Callable[[Images], Images]],
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """AdamW on one variant of the images per batch, taken in turn; the rate rises, then falls to zero."""
    batches = max(1, len(data.labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches, pct_start=0.1)
    inputs = [variant(data.images) for variant in variants]
    generator = torch.Generator().manual_seed(seed)
    step = 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for chosen in order.chunk(batches):
            loss = model(pixel_values=inputs[step % len(inputs)][chosen], labels=data.labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
    model.eval()


def train_base(folder: Path, data: Split, scale: Scale, seed: int) -> None:
    """Train on upright digits from random weights, and save."""
    model = build(scale, seed)
    train(model, data, [BASE], epochs=scale.base_epochs, rate=2e-3, seed=seed)
    model.save_pretrained(folder)


def train_expert(
    folder: Path, base: Path, data: Split, skill: Callable[[Images], Images], scale: Scale, seed: int
) -> None:
    """Fine-tune the base on one skill, and save."""
    model = transformers.ViTForImageClassification.from_pretrained(base)
    train(model, data, [skill, BASE], epochs=scale.expert_epochs, rate=8e-4, seed=seed)
    model.save_pretrained(folder)
