"""What student and teachers see of an example: the same text or image, each as it needs it, augmented alike.

Two classifiers may differ in tokenizer, image processor or size of images: then a batch holds the student's inputs and,
in its entry `teacher`, the teacher's; those of further teachers are in `teacher_2` and so on. A random crop is a share
of the image, so that all see the same part of it, whatever the sizes; everything is drawn from the example's seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from regraft.errors import UserError
from regraft.methods import Options
from regraft.train.batches import Batches, DataOptions, batches_for
from regraft.train.making import roles_for
from regraft.train.objective import Batch, Collate
from regraft.train.order import generator
from regraft.train.teacher import TEACHER

_TRIES = 10  # to draw a crop that fits
_LONGEST = math.log(4 / 3)  # of the sides of a crop, as everywhere


class AugmentOptions(Options):
    """How images are changed at random before the models see them."""

    crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="smallest share of an image that a random crop keeps, 0.08 in the paper; 1: no crop",
    )
    flip: bool = Field(False, description="mirror every second image, where that leaves its class as it is")
    noise: float = Field(0.0, ge=0, description="deviation of noise that is added to the pixels")

    @property
    def active(self) -> bool:
        return self.crop < 1 or self.flip or self.noise > 0


def augmented(pixels: Tensor, seed: int, options: AugmentOptions) -> Tensor:
    """One image (C, H, W), changed as its seed says: cropped and brought back to its size, mirrored, with noise."""
    source = generator(seed)
    if options.crop < 1:
        top, left, height, width = crop_box(source, options.crop, pixels.shape[-2] / pixels.shape[-1])
        rows, columns = pixels.shape[-2:]
        high, wide = max(1, round(height * rows)), max(1, round(width * columns))
        first, begin = min(round(top * rows), rows - high), min(round(left * columns), columns - wide)
        part = pixels[:, first : first + high, begin : begin + wide]
        pixels = functional.interpolate(
            part[None], size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
        )[0]
    mirrored = bool(torch.rand((), generator=source) < 0.5)
    if options.flip and mirrored:
        pixels = pixels.flip(-1)
    if options.noise:
        pixels = pixels + options.noise * torch.randn(pixels.shape, generator=source)
    return pixels


def crop_box(source: torch.Generator, least: float, ratio: float) -> tuple[float, float, float, float]:
    """A random part of an image as shares of its sides: (top, left, height, width).

    Its share of the area is uniform in [least, 1], its sides relate to one another as 3:4 to 4:3.

    Args:
        ratio: height of the image by its width.
    """
    for _ in range(_TRIES):
        draws = torch.rand(4, generator=source).tolist()
        area = least + (1 - least) * draws[0]
        shape = math.exp(_LONGEST * (2 * draws[1] - 1)) / ratio  # height by width, as shares
        height, width = math.sqrt(area * shape), math.sqrt(area / shape)
        if height <= 1 and width <= 1:
            return draws[2] * (1 - height), draws[3] * (1 - width), height, width
    return 0.0, 0.0, 1.0, 1.0


def own_batches(
    teacher: Any, folder: Path, student: Batches, example: Mapping[str, Any], columns: DataOptions, data: Path | None
) -> Batches | None:
    """How a teacher of a classifier is fed; None where the student's batches hold what it reads.

    Args:
        teacher: the model of `folder`.
        student: the student's batches.
        example: the first one of `data`.

    Raises:
        UserError: as `batches_for`.
    """
    own = batches_for(teacher, folder, example, columns, data=data, labels=False)
    alike = own.preparation()
    return None if alike and alike == student.preparation() else own


def seen_by_both(student: Collate, teacher: Collate | None, options: AugmentOptions | None = None) -> Collate:
    """`seen_by_all` for one teacher."""
    return seen_by_all(student, [teacher], options)


def seen_by_all(student: Collate, teachers: Sequence[Collate | None], options: AugmentOptions | None = None) -> Collate:
    """Batches of the student's inputs, with those of each teacher that has its own; `views` takes them apart.

    Args:
        student: makes the student's inputs.
        teachers: each makes a teacher's; None for one that takes the student's.
        options: how images are augmented, the same for all.
    """
    options = options or AugmentOptions()
    own = {name: one for name, one in zip(_entries(len(teachers)), teachers, strict=True) if one is not None}

    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
        batch = _changed(student(examples, seeds), seeds, options)
        return batch | {name: _changed(teacher(examples, seeds), seeds, options) for name, teacher in own.items()}

    return collate


def views(batch: Batch, teachers: int) -> tuple[Batch, list[Batch]]:
    """What the student and each of so many teachers see of a batch of `seen_by_all`."""
    names = _entries(teachers)
    own = {name: batch[name] for name in names if isinstance(batch.get(name), Mapping)}
    student = {name: value for name, value in batch.items() if name not in own}
    return student, [own.get(name, student) for name in names]


def _entries(teachers: int) -> list[str]:
    """The entries of a batch for the own inputs of teachers, called as the teachers are in a recipe."""
    return roles_for(TEACHER, teachers)


def _changed(batch: Batch, seeds: Sequence[int], options: AugmentOptions) -> Batch:
    if not options.active:
        return batch
    if "pixel_values" not in batch:
        raise UserError("RG303", "crop, flip and noise are for images, and the data holds texts", fix="leave them out")
    images = [augmented(image, seed, options) for image, seed in zip(batch["pixel_values"], seeds, strict=True)]
    return batch | {"pixel_values": torch.stack(images)}
