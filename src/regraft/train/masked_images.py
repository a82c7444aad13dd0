"""Masked image modelling: which patches of an image are hidden, drawn image by image; and encoders run on whole images.

Two kinds of models guess hidden patches. Those with a mask token (`...ForMaskedImageModeling`, as in SimMIM) are told
where to put it. Masked auto-encoders (`ViTMAEForPreTraining`) leave hidden patches out: they sort patches by a noise
and keep the floor(n (1 - ratio)) first ones. Here both kinds hide the same patches of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regraft.errors import UserError
from regraft.train.order import generator
from regraft.train.tap import accepted

SIMMIM_RATIO = 0.6  # of models with a mask token, whose configuration names none


def is_auto_encoder(model: Any) -> bool:
    """Whether a model, or its encoder, leaves hidden patches out."""
    return {"pixel_values", "noise"} <= accepted(type(model))


def guesses_patches(model: Any) -> bool:
    """Whether a model's own loss is that of masked image modelling on pixels."""
    name, takes = type(model).__name__, accepted(type(model))
    with_token = "MaskedImageModeling" in name and "bool_masked_pos" in takes and "labels" not in takes
    return with_token or (is_auto_encoder(model) and "PreTraining" in name)


def patches_of(model: Any) -> int:
    """How many patches an image of the size that the model is made for has."""
    (height, width), (rows, columns) = (_pair(getattr(model.config, key)) for key in ("image_size", "patch_size"))
    return (height // rows) * (width // columns)


def hiding(
    model: Any, pixels: Callable[..., Tensor], ratio: float | None, scaled: bool | None
) -> Callable[..., dict[str, Any]]:
    """A function from examples and seeds to a batch with hidden patches.

    An auto-encoder hides as many patches as its configuration says, so `ratio` and `scaled` are entered there.

    Args:
        pixels: examples -> (B, channels, height, width).
        ratio: share of the patches that is hidden; None for that of the configuration.
        scaled: whether an auto-encoder guesses patches scaled to mean 0 and variance 1; None as configured.

    Raises:
        UserError: RG303 for a ratio that hides all patches or none, or for `scaled` where there is no such choice;
            RG309 for a model whose decoder gives images of another size.
    """
    config, auto_encoder = model.config, is_auto_encoder(model)
    if auto_encoder:
        ratio = config.mask_ratio if ratio is None else ratio
        config.mask_ratio = ratio
        config.norm_pix_loss = config.norm_pix_loss if scaled is None else scaled
    elif scaled is not None:
        raise UserError("RG303", f"a {type(model).__name__} guesses pixels as they are", fix="leave out norm_pix_loss")
    else:
        ratio = SIMMIM_RATIO if ratio is None else ratio
        coarse = _pair(config.patch_size)[0] * 2 ** max(0, len(getattr(config, "depths", ())) - 1)
        if config.encoder_stride != coarse:
            what = f"the model's decoder enlarges by {config.encoder_stride}, and its encoder makes {coarse} pixels one"
            raise UserError("RG309", what, fix=f"use a model whose encoder_stride is {coarse}")
    count = patches_of(model)
    kept = int(count * (1 - ratio))
    if not 0 < kept < count:
        what = f"a mask_ratio of {ratio} hides {count - kept} of {count} patches"
        raise UserError("RG303", what, fix="hide some of them, not none and not all")

    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        noise = torch.stack([torch.rand(count, generator=generator(seed)) for seed in seeds])
        batch: dict[str, Any] = {"pixel_values": pixels(examples)}
        if auto_encoder:
            return {**batch, "noise": noise}
        return {**batch, "bool_masked_pos": noise.argsort(1).argsort(1) >= kept}

    return collate


def hide_alike(student: Any, teacher: Any) -> None:
    """Have an auto-encoder that reads the batches of another one hide as many patches, and guess the same of them."""
    if is_auto_encoder(student) and is_auto_encoder(teacher):
        for name in ("mask_ratio", "norm_pix_loss"):
            setattr(teacher.config, name, getattr(student.config, name))


def whole(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """The inputs with which an encoder, within `showing_all`, sees whole images with their patches in order."""
    if not is_auto_encoder(model):
        return {"pixel_values": pixels}
    count = patches_of(model)
    return {"pixel_values": pixels, "noise": (torch.arange(count) / count).expand(len(pixels), count)}


@contextmanager
def showing_all(encoder: Any) -> Iterator[None]:
    """Within the context an auto-encoder hides nothing; for other models nothing changes."""
    if not is_auto_encoder(encoder):
        yield
        return
    ratio = encoder.config.mask_ratio
    encoder.config.mask_ratio = 0.0
    try:
        yield
    finally:
        encoder.config.mask_ratio = ratio


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (list, tuple)) else (int(value), int(value))
