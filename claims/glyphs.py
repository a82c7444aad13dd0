"""The zoo's masked auto-encoder of images: pre-trained on generated strokes and blobs, which look a little like digits.

What it is adapted to are scikit-learn's handwritten digits: a few hundred without labels, some of them with.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from claims.language_models import fit
from claims.shared import example
from regraft.claims.zoo import Quality, entry
from regraft.train.masked_images import hiding

digits = example("digits", "skills")

PATCH = 2
# Width, layers, images, steps.
SIZES = {"laptop": (64, 4, 20_000, 2000), "smoke": (16, 1, 200, 2)}
BATCH = 64
Row = dict[str, Tensor]


def glyphs(count: int, seed: int) -> Tensor:
    """(count, 1, 8, 8), 0 is paper and 1 is ink: three strokes of random ends or, one in four, blobs instead."""
    draws = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    pixel = torch.stack([rows, columns], -1).view(1, 1, 64, 2)
    begin, end = 0.5 + 6 * torch.rand(2, count, 3, 1, 2, generator=draws)
    # A blob is a stroke without length, and wider.
    blob = torch.rand(count, 3, 1, 1, generator=draws) < 0.25
    end = torch.where(blob, begin, end)
    along = end - begin
    place = ((pixel - begin) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp(min=1e-6)
    nearest = begin + place.clamp(0, 1) * along
    width = (0.4 + 0.4 * torch.rand(count, 3, 1, generator=draws)) * torch.where(blob[..., 0], 2.0, 1.0)
    ink = torch.exp(-(pixel - nearest).square().sum(-1) / (2 * width.square()))
    return ink.amax(1).view(count, 1, 8, 8)


def pixels(rows: list[Row]) -> Tensor:
    return torch.stack([row["pixel_values"] for row in rows])


def hidden(model: transformers.ViTMAEForPreTraining, images: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    """A batch of some images with three quarters of their patches hidden."""
    return hiding(model, pixels, None, None)([{"pixel_values": image} for image in images], seeds)


@torch.inference_mode()
def error(model: transformers.ViTMAEForPreTraining, images: Tensor) -> float:
    """Of hidden patches, each scaled to variance 1: 1 is what guessing the mean of the patch gives."""
    return float(model(**hidden(model, images, list(range(len(images))))).loss)


@entry(data="generated: 20 000 images of 8 x 8 pixels with three strokes or blobs")
def auto_encoder(folder: Path, *, seed: int, scale: str) -> Quality:
    width, layers, count, steps = SIZES[scale]
    config = transformers.ViTMAEConfig(
        image_size=8,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        decoder_hidden_size=32,
        decoder_intermediate_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        mask_ratio=0.75,
        norm_pix_loss=True,
    )
    torch.manual_seed(seed)
    model = transformers.ViTMAEForPreTraining(config)
    images = glyphs(count, seed)
    draws = torch.Generator().manual_seed(seed)

    def batch(_: int) -> dict[str, Tensor]:
        chosen = torch.randint(count, (BATCH,), generator=draws)
        return hidden(model, images[chosen], torch.randint(2**40, (BATCH,), generator=draws).tolist())

    fit(model, batch, steps, 2e-3)
    model.save_pretrained(folder)
    found = error(model, glyphs(500, seed + 10**6))
    metric = "error of hidden patches of unseen images"
    return Quality(metric, found, 1.0, "the mean of each patch", 0.1, higher_is_better=False)


def read(path: Path) -> transformers.ViTMAEForPreTraining:
    model = transformers.ViTMAEForPreTraining.from_pretrained(path)
    return model.eval()


def splits(seed: int, count: int) -> dict[str, digits.Split]:
    """Digits: `count` for adapting to, 250 to choose by, and all others for the test."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    everything = digits.load_splits(0)
    images = torch.cat([part.images for part in everything.values()])[order]
    labels = torch.cat([part.labels for part in everything.values()])[order]
    cuts = {"target": slice(0, count), "validation": slice(count, count + 250), "test": slice(count + 250, None)}
    return {name: digits.Split(images[cut], labels[cut]) for name, cut in cuts.items()}
