"""The zoo's models of images: vision transformers on scikit-learn's digits, and one fine-tune of each per skill.

The base reads upright digits and, through light noise and small shifts in training, a part of every skill; a skill is a
fixed change of the images. The head is the base's own in all fine-tunes, as the text head of CLIP is in the papers on
merging, so that bodies can be merged and scored on every skill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from claims.shared import State, example
from regraft.claims.zoo import Quality, entry

digits = example("digits", "skills")
training = example("digits", "training")
Images = Tensor  # float32 (n, 1, 8, 8), 0 is paper and 1 is ink


def moved(images: Images) -> Images:
    """Moved right by two pixels, twice as far as the base has seen."""
    return images.roll(2, 3)


def inverted(images: Images) -> Images:
    return 1 - images


def thickened(images: Images) -> Images:
    """Each pixel as dark as the darkest of itself and three neighbours."""
    return functional.max_pool2d(functional.pad(images, (0, 1, 0, 1)), 2, stride=1)


def mirrored(images: Images) -> Images:
    return images.flip(3)


def noisy(images: Images) -> Images:
    """The same noise whenever the same number of images is changed."""
    generator = torch.Generator().manual_seed(len(images))
    return (images + 0.35 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def occluded(images: Images) -> Images:
    """The middle of the left half covered."""
    images = images.clone()
    images[:, :, 2:6, 1:4] = 0.5
    return images


def blurred(images: Images) -> Images:
    """Each pixel the mean of itself and its eight neighbours, and dimmed."""
    return 0.7 * functional.avg_pool2d(images, 3, stride=1, padding=1)


# In this order: claims with fewer experts take the first.
SKILLS: dict[str, Callable[[Images], Images]] = {
    f.__name__: f
    for f in (
        digits.rotated,
        thickened,
        moved,
        occluded,
        digits.framed,
        blurred,
        mirrored,
        digits.striped,
    )
}
ALL = {f.__name__: f for f in (digits.upright, noisy, inverted)} | SKILLS

# (width, layers, epochs of the base, epochs of a fine-tune, images)
SIZES = {"laptop": (128, 3, 50, 15, None), "smoke": (16, 1, 2, 2, 300)}


@lru_cache(maxsize=4)
def splits(seed: int, scale: str) -> dict[str, digits.Split]:
    """train, validation and test, by image; the same for all skills."""
    return digits.load_splits(seed, SIZES[scale][4])


def load(path: Path) -> transformers.ViTForImageClassification:
    return transformers.ViTForImageClassification.from_pretrained(path).eval()


def state_of(path: Path) -> State:
    return {name: value.detach() for name, value in load(path).state_dict().items()}


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Images, labels: Tensor) -> float:
    return float((model(pixel_values=images).logits.argmax(-1) == labels).float().mean())


def jittered(images: Images) -> Images:
    """Moved by up to one pixel, dimmed, and with noise, drawn anew."""
    steps = torch.randint(-1, 2, (len(images), 2)).tolist()
    moved = torch.stack([image.roll(tuple(step), (1, 2)) for image, step in zip(images, steps, strict=True)])
    return (moved * (0.6 + 0.4 * torch.rand(len(images), 1, 1, 1)) + 0.15 * torch.randn(images.shape)).clamp(0, 1)


VARIANTS = [digits.upright, *(jittered for _ in range(7))]


def jittered_split(seed: int, scale: str, part: str) -> digits.Split:
    """Images of a split, jittered in the same way each time."""
    torch.manual_seed(seed)
    split = splits(seed, scale)[part]
    return digits.Split(jittered(split.images), split.labels)


def linear_accuracy(train: Sequence[digits.Split], test: digits.Split) -> float:
    """The baseline: logistic regression on the pixels of the same images."""
    inputs, labels = torch.cat([s.images.flatten(1) for s in train]), torch.cat([s.labels for s in train])
    model = LogisticRegression(max_iter=1000).fit(inputs.numpy(), labels.numpy())
    return float(model.score(test.images.flatten(1).numpy(), test.labels.numpy()))


@entry(data="scikit-learn's 1797 digits, upright and with small shifts, dimming and noise; 63 % for training")
def digits_vit(folder: Path, *, seed: int, scale: str, width: int = 0) -> Quality:
    default, layers, epochs, _, images = SIZES[scale]
    size = training.Scale(images, width or default, layers, epochs, 0)
    model = training.build(size, seed)
    train, test = (jittered_split(seed, scale, part) for part in ("train", "test"))
    upright = splits(seed, scale)["train"]
    training.train(model, upright, VARIANTS, epochs=epochs, rate=2e-3, seed=seed)
    model.save_pretrained(folder)
    found, plain = accuracy(model, test.images, test.labels), linear_accuracy([upright, train], test)
    return Quality(
        "accuracy on shifted, dimmed and noisy digits", found, plain, "logistic regression", 0.03, chance=0.1
    )


@entry(data="the same digits under one fixed change, and upright in every second batch")
def digits_skill(
    folder: Path, *, skill: str, seed: int, scale: str, width: int = 0, optimizer: str = "adamw"
) -> Quality:
    """`optimizer`: "adamw" changes all weights by about the same small amount; "sgd" changes few of them much."""
    epochs = SIZES[scale][3]
    parts = splits(seed, scale)
    model = load(digits_vit(seed=seed, scale=scale, width=width))
    changed = ALL[skill](parts["test"].images)
    before = accuracy(model, changed, parts["test"].labels)
    model.classifier.requires_grad_(False)
    order, variants = seed * 100 + 1 + list(ALL).index(skill), [ALL[skill], digits.upright]
    if optimizer == "adamw":
        training.train(model, parts["train"], variants, epochs=epochs, rate=3e-4, seed=order)
    else:
        _with_momentum(model, parts["train"], variants, epochs, 0.03, order)
    model.save_pretrained(folder)
    after = accuracy(model, changed, parts["test"].labels)
    return Quality(f"accuracy on {skill} digits", after, before, "its base", 0.01, chance=0.1)


def _with_momentum(
    model: torch.nn.Module,
    data: digits.Split,
    variants: Sequence[Callable[[Images], Images]],
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    """The training of the example, with plain gradient descent and momentum."""
    batches = max(1, len(data.labels) // training.BATCH)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * batches, pct_start=0.1, cycle_momentum=False
    )
    inputs = [variant(data.images) for variant in variants]
    draws, step = torch.Generator().manual_seed(seed), 0
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=draws).chunk(batches):
            loss = model(pixel_values=inputs[step % len(inputs)][chosen], labels=data.labels[chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
    model.eval()


# Other questions about the same images, each with a head of its own; -1 is an image that is not asked about.
LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "parity": lambda digit: digit % 2,
    "magnitude": lambda digit: (digit >= 5).long(),
    "low digits": lambda digit: torch.where(digit < 5, digit, torch.full_like(digit, -1)),
    "high digits": lambda digit: torch.where(digit >= 5, digit - 5, torch.full_like(digit, -1)),
}


@entry(data="the base's digits with other labels: parity, magnitude, or one of two disjoint sets of classes")
def digits_labels(folder: Path, *, labels: str, seed: int, scale: str) -> Quality:
    def relabelled(part: digits.Split) -> digits.Split:
        found = LABELS[labels](part.labels)
        return digits.Split(part.images[found >= 0], found[found >= 0])

    upright = relabelled(splits(seed, scale)["train"])
    train, test = (relabelled(jittered_split(seed, scale, part)) for part in ("train", "test"))
    classes = int(train.labels.max()) + 1
    base = digits_vit(seed=seed, scale=scale)
    torch.manual_seed(seed)
    model = transformers.ViTForImageClassification.from_pretrained(
        base, num_labels=classes, ignore_mismatched_sizes=True
    )
    training.train(model, upright, VARIANTS, epochs=SIZES[scale][3], rate=5e-4, seed=seed)
    model.save_pretrained(folder)
    found, plain = accuracy(model, test.images, test.labels), linear_accuracy([upright, train], test)
    return Quality(f"accuracy on {labels}", found, plain, "logistic regression", 0.03, chance=1 / classes)
