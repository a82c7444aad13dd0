"""A small residual network learns digits from scratch, from a hundred images with their labels. Each image also has a
description of what can be measured in its pixels: how much ink, how wide, how it leans, where its holes are, how many
strokes a cut across meets, where most of the ink lies. The label is not asked when it is made. The published MiniLM
encoder embeds the descriptions, the network aligns its features with them, and test images come without.

Controls have the same loss, schedule and number of tries: descriptions that only name the digit; the same descriptions,
shuffled among the images; random vectors, one per image; and no text, where label smoothing takes the place of the
alignment's weight. Tries are 2 learning rates times 2 weights (or smoothings), chosen on validation images; what is
chosen is trained anew on other sets of a hundred images from other initial weights, and these runs alone are tested.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from claims import vision, zoo
from claims.shared import best, grid
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.objectives.descriptions import EMBEDDINGS, FEATURES, NUMBERS, Descriptions
from regraft.train.loop import train
from regraft.train.methods.gpt4image import gpt4image
from regraft.train.objective import Batch, Sum, Term
from regraft.train.options import TrainOptions
from regraft.train.tap import Seen, look
from regraft.train.text_embeddings import TextEncoder, embed_texts

IMAGES, BATCH = 100, 50
STEPS, REPEATS = 100, 3
RATES, WEIGHTS, SMOOTHINGS = [3e-3, 1e-2], [0.1, 0.3], [0.0, 0.1]
ALIGNED = ("described", "named", "shuffled", "random")
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Facts:
    """What is measured in one image; places from 0 (top, left) to 1."""

    ink: float
    width: float
    lean: float
    holes: tuple[float, ...]  # how far down each of them is
    across: tuple[int, int, int]  # strokes that cuts through the upper, middle and lower part meet
    down: int  # strokes that a cut from top to bottom through the middle of the ink meets
    centre: tuple[float, float]


def facts(image: Tensor) -> Facts:
    """Measurements of an image (8, 8), 1 is ink."""
    fine = functional.interpolate(image[None, None], scale_factor=4, mode="bilinear", align_corners=False)[0, 0]
    dark = (fine > 0.45).numpy()
    weight = fine.numpy().astype(np.float64)
    weight /= weight.sum()
    rows, columns = np.mgrid[: dark.shape[0], : dark.shape[1]] / (dark.shape[0] - 1)
    y, x = float((weight * rows).sum()), float((weight * columns).sum())
    spread = float((weight * (rows - y) ** 2).sum())
    spaces, count = ndimage.label(~np.pad(dark, 1))
    holes = [
        float((np.argwhere(spaces == i)[:, 0].mean() - 1) / (dark.shape[0] - 1))
        for i in range(1, count + 1)
        if i != spaces[0, 0] and (spaces == i).sum() >= 4
    ]
    inked = np.flatnonzero(dark.any(1))
    top, bottom = (int(inked[0]), int(inked[-1])) if len(inked) else (0, dark.shape[0] - 1)
    cuts = tuple(_runs(dark[round(top + share * (bottom - top))]) for share in (0.2, 0.5, 0.8))
    return Facts(
        ink=float(image.mean()),
        width=float((weight * (columns - x) ** 2).sum()) ** 0.5,
        lean=-float((weight * (rows - y) * (columns - x)).sum()) / max(spread, 1e-9),
        holes=tuple(sorted(holes)),
        across=(cuts[0], cuts[1], cuts[2]),
        down=_runs(dark[:, round(x * (dark.shape[1] - 1))]),
        centre=(y, x),
    )


def _runs(line: Any) -> int:
    """How often ink begins along a line."""
    return int((np.diff(np.concatenate([[0], line.astype(int)])) == 1).sum())


def description(found: Facts) -> str:
    """The measurements in words."""
    ink = _word(found.ink, (0.27, 0.34), ("thin", "medium", "bold"))
    width = _word(found.width, (0.17, 0.2), ("narrow", "fairly wide", "very wide"))
    lean = _word(found.lean, (-0.08, 0.08, 0.25), ("leans left", "stands upright", "leans right", "leans far right"))
    where = [_word(down, (0.42, 0.58), ("the upper half", "the middle", "the lower half")) for down in found.holes]
    holes = f"{COUNTS[min(len(where), 9)]} closed loop{'' if len(where) == 1 else 's'}"
    holes += f", in {' and '.join(where)}" if where else ""
    upper, middle, lower = (COUNTS[min(n, 9)] for n in found.across)
    vertical = _word(found.centre[0], (0.47, 0.53), ("high", "central", "low"))
    horizontal = _word(found.centre[1], (0.47, 0.53), ("left", "central", "right"))
    return (
        f"A {ink}, {width} figure that {lean}, with {holes}. Cuts across meet {upper} stroke(s) in the upper part, "
        f"{middle} in the middle and {lower} in the lower part; a cut from top to bottom meets {COUNTS[found.down]}. "
        f"Its weight is {vertical} and {horizontal}."
    )


def _word(value: float, bounds: Sequence[float], words: Sequence[str]) -> str:
    return words[sum(value > bound for bound in bounds)]


class Smoothed(Term):
    """Cross-entropy with label smoothing; without it, the model's own loss."""

    name = "own"

    def __init__(self, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        return functional.cross_entropy(student.logits, batch["labels"], label_smoothing=self.smoothing)


class Study:
    """Networks from scratch on a few images, in one of the arms."""

    def __init__(self, seed: int, scale: str) -> None:
        self.seed, self.smoke = seed, scale == "smoke"
        self.parts = vision.splits(seed, scale)
        self.encoder = TextEncoder(zoo.minilm(seed=0, scale=scale), device="cpu")
        self.steps, self.repeats = (STEPS, REPEATS) if not self.smoke else (2, 1)
        self.inputs = {name: zoo.doubled(part.images) for name, part in self.parts.items()}
        train = self.parts["train"]
        self.said = [description(facts(image[0])) for image in train.images]
        names = [f"a handwritten digit {NAMES[int(label)]}" for label in train.labels]
        self.described = self.embedded(self.said)
        self.vectors = {"described": self.described, "named": self.embedded(names)}

    def embedded(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        made = embed_texts(self.encoder, texts, centre=True)
        return made(texts)

    def chosen(self, repeat: int) -> Tensor:
        """The images of one training set, as many of each digit."""
        draws = torch.Generator().manual_seed(1000 * self.seed + repeat)
        labels = self.parts["train"].labels
        order = torch.randperm(len(labels), generator=draws)
        return torch.cat([order[labels[order] == digit][: IMAGES // 10] for digit in range(10)])

    def targets(self, arm: str, chosen: Tensor, repeat: int) -> tuple[Tensor, Tensor]:
        """(embeddings, numbers) of the chosen images in an arm."""
        draws = torch.Generator().manual_seed(7919 * self.seed + repeat)
        if arm == "random":
            drawn = torch.randn(len(chosen), self.encoder.dimension, generator=draws)
            return functional.normalize(drawn, dim=-1), torch.arange(len(chosen))
        order = torch.randperm(len(chosen), generator=draws) if arm == "shuffled" else torch.arange(len(chosen))
        vectors, numbers = self.vectors["named" if arm == "named" else "described"]
        return vectors[chosen][order], numbers[chosen][order]

    def fit(self, arm: str, repeat: int, rate: float, weight: float) -> Any:
        chosen = self.chosen(repeat)
        images, labels = self.inputs["train"][chosen], self.parts["train"].labels[chosen]
        terms: list[tuple[float, Term]] = [(1.0, Smoothed(weight if arm == "plain" else 0.0))]
        vectors, numbers = self.targets(arm, chosen, repeat)
        if arm != "plain":
            terms.append((weight, Descriptions(self.encoder.dimension, seed=repeat)))

        def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
            at = torch.tensor([example["number"] for example in examples])
            batch = {"pixel_values": images[at], "labels": labels[at]}
            return batch if arm == "plain" else {**batch, EMBEDDINGS: vectors[at], NUMBERS: numbers[at]}

        model = network(100 * self.seed + repeat)
        options = TrainOptions(
            learning_rate=rate, per_device_train_batch_size=BATCH, max_steps=self.steps, warmup_ratio=0.1,
            weight_decay=0.05, seed=repeat, drop_last=True, save_steps=0, logging_steps=1000,
        )  # fmt: skip
        rows = [{"number": i} for i in range(len(chosen))]
        with tempfile.TemporaryDirectory() as folder:
            train(model, Sum(collate, terms), rows, options, folder=folder, device="cpu")
        return model

    def score(self, model: Any, part: str) -> float:
        return vision.accuracy(model, self.inputs[part], self.parts[part].labels)

    def arm(self, arm: str) -> dict[str, float]:
        """The accuracy of what was chosen, and how well a linear map reads the lean of test images in its features."""
        tries = grid(rate=RATES, weight=SMOOTHINGS if arm == "plain" else WEIGHTS)
        options, validation = best(
            tries if not self.smoke else tries[:1], lambda **o: self.score(self.fit(arm, 0, **o), "validation")
        )
        models = [self.fit(arm, 1 + i, **options) for i in range(self.repeats)]
        return {
            f"accuracy/{arm}": statistics.fmean(self.score(model, "test") for model in models),
            f"lean/{arm}": statistics.fmean(self.lean(model) for model in models),
            f"validation/{arm}": validation,
            f"rate/{arm}": options["rate"],
            f"weight/{arm}": options["weight"],
        }

    def lean(self, model: Any) -> float:
        """R^2, on test images, of a linear map from features to how far a figure leans, fitted on validation images."""
        known, asked = (self._features(model, part) for part in ("validation", "test"))
        target = {name: self._leans(name) for name in ("validation", "test")}
        weights = torch.linalg.lstsq(known.T @ known + torch.eye(known.shape[1]), known.T @ target["validation"])
        wrong = (asked @ weights.solution - target["test"]).square().mean()
        return float(1 - wrong / target["test"].var(unbiased=False))

    @lru_cache(maxsize=4)  # noqa: B019 - a study lives as long as its seed
    def _leans(self, part: str) -> Tensor:
        return torch.tensor([facts(image[0]).lean for image in self.parts[part].images])

    @torch.no_grad()
    def _features(self, model: Any, part: str) -> Tensor:
        found = look(model, {"pixel_values": self.inputs[part]}, [FEATURES])[FEATURES].flatten(1)
        return torch.cat([found, torch.ones(len(found), 1)], 1)


def network(seed: int) -> Any:
    """The zoo's residual network, untrained."""
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    torch.manual_seed(seed)
    return transformers.ResNetForImageClassification(config)


def run(seed: int, scale: str) -> Figures:
    study = Study(seed, scale)
    figures = {"mean cosine": embed_texts(study.encoder, study.said).mean_cosine}
    for arm in ("plain", *ALIGNED):
        figures |= study.arm(arm)
    return figures


def gain(over: str) -> Any:
    return lambda f: f["accuracy/described"] - f[f"accuracy/{over}"]


CLAIM = Claim(
    title="GPT4Image",
    paper=next(paper for paper in gpt4image.papers if paper.number == 4),
    sentence="An image classifier that also learns from descriptions of its training images is better, and what they"
    " say is what helps.",
    baselines=("labels alone, with label smoothing", "descriptions that name the class", "shuffled descriptions"),
    run=run,
    checks=(
        Check("descriptions are better than labels alone", gain("plain"), 0.01),
        Check("descriptions are better than the same ones, shuffled", gain("shuffled"), 0.01),
        Check("descriptions are better than random vectors", gain("random"), 0.01, decides=False),
        Check("descriptions are better than the name of the class", gain("named"), 0.01, decides=False),
        Check(
            "features tell how a figure leans, which is no part of its class, better than without descriptions",
            lambda f: f["lean/described"] - f["lean/plain"],
            0.05,
            decides=False,
        ),
    ),
    plot=Plot(
        "Accuracy on test digits, %",
        tuple(
            Row(label, f"accuracy/{arm}", group)
            for label, arm, group in (
                ("labels alone", "plain", "100 images"),
                ("random vectors", "random", "100 images"),
                ("shuffled", "shuffled", "100 images"),
                ("the class's name", "named", "100 images"),
                ("descriptions", "described", "100 images"),
            )
        ),
    ),
)
