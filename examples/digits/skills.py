"""The data: scikit-learn's handwritten digits, upright and in four variants that the base model never sees.

Every variant is a fixed change of the same 8 x 8 images, so an image set can be written down and looked at. The split
is by image, the same for all skills: a test image is in no training set, in whatever variant.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

Images = Tensor  # float32 (n, 1, 8, 8), 0 is paper and 1 is ink


def upright(images: Images) -> Images:
    return images


def rotated(images: Images) -> Images:
    """Turned by 25 degrees, which moves the outer pixels by more than one place."""
    angle = torch.deg2rad(torch.tensor(25.0))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]]).expand(len(images), 2, 3)
    grid = functional.affine_grid(turn, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def shifted(images: Images) -> Images:
    """Moved right by one pixel, which is a quarter of a patch."""
    return images.roll(1, 3)


def striped(images: Images) -> Images:
    """Every third column inked."""
    images = images.clone()
    images[:, :, :, ::3] = 1.0
    return images


def framed(images: Images) -> Images:
    """An inked frame of one pixel around the digit."""
    return functional.pad(images[:, :, 1:-1, 1:-1], (1, 1, 1, 1), value=1.0)


BASE = upright
EXPERTS = (rotated, shifted, striped, framed)
SKILLS: dict[str, Callable[[Images], Images]] = {f.__name__: f for f in (BASE, *EXPERTS)}


@dataclass(frozen=True)
class Split:
    """Images and their digits, int64 (n,)."""

    images: Images
    labels: Tensor


def load_splits(seed: int, limit: int | None = None) -> dict[str, Split]:
    """train, validation and test (63, 17 and 20 %), drawn once from the 1797 images, or from the first `limit`."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
    train, validation = round(0.63 * len(order)), round(0.8 * len(order))
    parts = {"train": order[:train], "validation": order[train:validation], "test": order[validation:]}
    return {name: Split(images[part], labels[part]) for name, part in parts.items()}


def write_data(path: Path, split: Split) -> None:
    """JSON Lines: all images of a split in every variant, with their skill as the group. Skills have equal shares, so
    the accuracy over all rows is the mean over skills."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for skill, change in SKILLS.items():
            for image, label in zip(change(split.images).squeeze(1), split.labels.tolist(), strict=True):
                pixels = [[round(value, 3) for value in row] for row in image.tolist()]
                stream.write(json.dumps({"group": skill, "label": str(label), "pixel_values": pixels}) + "\n")
