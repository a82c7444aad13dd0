"""Models that know different parts of one task teach one another: digits under four fixed changes in equal shares. The
students are small vision transformers that were tuned to one of these; their teachers are an expert of another change,
a residual network, and an expert that is larger. Data for the transfer are training images under all four changes.

Arms: plain distillation (KL), KL with cross-entropy (XE-KL), XE-KL with interpolated weights (MCL), KL with data
partition by labels (supervised) and by confidence (unsupervised), and, which the paper lacks, fine-tuning on the labels
for as many steps. Each chooses one of three learning rates by the mean over all pairs on validation images. The
ensemble, by which of both is surer, is told beside them, and the student as it was.

A teacher is called weak or strong by its accuracy in a pilot. The paper interpolates weights over some thousand steps;
the decay here is such that the slow weights move as far.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from claims import vision
from claims.zoo import digits_resnet, doubled
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.inspect.flips import flips
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.transfer import Transfer
from regraft.resize.surgery import load
from regraft.train.classes import Source
from regraft.train.methods.transfer import transfer
from regraft.train.objective import Objective, Sum

RATES = (0.001, 0.003, 0.01)
STEPS = {"laptop": 60, "smoke": 2}
BATCH = 64
# The paper's slow weights take 1e-4 of the fast ones some 5,000 times; these take as much in all, 30 times.
DECAY = 1 - 0.5 / 30
# name of the pair -> (student, teacher)
PAIRS = {
    "weak: resnet > framed": ("framed", "resnet"),
    "weak: rotated > framed": ("framed", "rotated"),
    "strong: resnet > rotated": ("rotated", "resnet"),
    "strong: large framed > rotated": ("rotated", "large framed"),
}
SKILLS = ("rotated", "framed", "occluded", "thickened")


@dataclass(frozen=True)
class Part:
    """Images as the vision transformers see them, with labels."""

    images: Tensor
    labels: Tensor


class Told:
    """In place of a frozen model: what it says of these images was asked once, and comes with the batch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, batch: Mapping[str, Tensor]) -> SimpleNamespace:
        return SimpleNamespace(logits=batch[self.name])


class Study:
    """The models, the data, and what the models say of it."""

    def __init__(self, seed: int, scale: str) -> None:
        self.seed, self.scale = seed, scale
        small = 32 if scale == "laptop" else 0
        folders = {
            "rotated": vision.digits_skill(skill="rotated", seed=seed, scale=scale, width=small),
            "framed": vision.digits_skill(skill="framed", seed=seed, scale=scale, width=small),
            "large framed": vision.digits_skill(skill="framed", seed=seed, scale=scale),
            "resnet": digits_resnet(seed=seed, scale=scale),
        }
        self.models = {name: load(path).eval() for name, path in folders.items()}
        self.parts = {part: self._changed(part) for part in ("train", "validation", "test")}
        self.said: dict[tuple[str, str], Tensor] = {}

    def _changed(self, part: str) -> Part:
        """All images of a split under each of the changes."""
        split = vision.splits(self.seed, self.scale)[part]
        return Part(torch.cat([vision.ALL[skill](split.images) for skill in SKILLS]), split.labels.repeat(len(SKILLS)))

    def seen(self, name: str, images: Tensor) -> Tensor:
        """Images as a model takes them."""
        return doubled(images) if name == "resnet" else images

    def logits(self, name: str, part: str) -> Tensor:
        """What one of the models says of a part of the data."""
        if (name, part) not in self.said:
            self.said[name, part] = self._logits(self.models[name], name, part)
        return self.said[name, part]

    @torch.inference_mode()
    def _logits(self, model: Any, name: str, part: str) -> Tensor:
        images = self.seen(name, self.parts[part].images)
        return torch.cat([model(pixel_values=group).logits for group in images.split(256)]).clone()

    def score(self, logits: Tensor, part: str) -> float:
        return float((logits.argmax(-1) == self.parts[part].labels).float().mean())

    def learned(self, student: str, teacher: str | None, arm: str, rate: float) -> dict[str, Tensor]:
        """The logits on validation and test images of a student that an arm has trained."""
        part = self.parts["train"]
        columns = {
            "pixel_values": self.seen(student, part.images),
            "labels": part.labels,
            "former": self.logits(student, "train"),
            **({"teacher": self.logits(teacher, "train")} if teacher is not None else {}),
        }
        model = copy.deepcopy(self.models[student]).train()
        objective = ARMS[arm]()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        slow: dict[str, Tensor] = {}
        draws = torch.Generator().manual_seed(self.seed)
        batches: list[Tensor] = []
        for step in range(STEPS[self.scale]):
            if not batches:
                batches = list(torch.randperm(len(part.labels), generator=draws).split(BATCH))[:-1]
            chosen = batches.pop()
            loss, _ = objective.loss(model, {name: column[chosen] for name, column in columns.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if arm == "mcl" and step % 2 == 0:
                state = {n: v.detach() for n, v in model.state_dict().items() if v.is_floating_point()}
                slow = {n: v.lerp(slow[n], DECAY) for n, v in state.items()} if slow else copy.deepcopy(state)
        model.load_state_dict(slow, strict=False)
        model.eval()
        return {name: self._logits(model, student, name) for name in ("validation", "test")}


def collate(examples: Sequence[Mapping[str, Tensor]], seeds: Sequence[int]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def taught(**options: Any) -> Objective:
    """The objective of an arm with a teacher."""
    former, teacher = (Source(Told(name), collate, shares=True) for name in ("former", "teacher"))  # type: ignore[arg-type]
    return Transfer(collate, former, [teacher], **options)


def labelled() -> Objective:
    return Sum(collate, [(1.0, OwnLoss())])


ARMS: dict[str, Callable[[], Objective]] = {
    "kl": partial(taught, partition="none"),
    "xekl": partial(taught, partition="none", alpha=0.5),
    "mcl": partial(taught, partition="none", alpha=0.68, skip_negative_flips=True),
    "supervised": partial(taught, partition="supervised"),
    "confidence": partial(taught, partition="confidence"),
    "labels": labelled,
}


def run(seed: int, scale: str) -> Figures:
    study = Study(seed, scale)
    figures: dict[str, float] = {}
    truth = study.parts["test"].labels.numpy()
    for pair, (student, teacher) in PAIRS.items():
        own, other = (study.logits(name, "test") for name in (student, teacher))
        found = flips(own.argmax(-1).numpy(), other.argmax(-1).numpy(), truth)
        figures |= {f"student/{pair}": found.student, f"teacher/{pair}": found.teacher}
        figures |= {f"positive/{pair}": found.positive, f"negative/{pair}": found.negative}
        surer = other.softmax(-1).amax(-1) > own.softmax(-1).amax(-1)
        figures[f"ensemble/{pair}"] = study.score(torch.where(surer[:, None], other, own), "test")
    for arm in ARMS:
        learned = {rate: of_all_pairs(study, arm, rate) for rate in RATES}
        means = {
            rate: statistics.fmean(study.score(logits["validation"], "validation") for logits in of_rate.values())
            for rate, of_rate in learned.items()
        }
        best = max(means, key=lambda rate: means[rate])
        figures[f"rate/{arm}"] = best
        for pair, logits in learned[best].items():
            figures[f"{arm}/{pair}"] = study.score(logits["test"], "test")
    for arm in ("student", "teacher", "positive", "ensemble", *ARMS):
        for kind in ("weak", "strong"):
            figures[f"{arm}/{kind}"] = statistics.fmean(
                figures[f"{arm}/{pair}"] for pair in PAIRS if pair.startswith(kind)
            )
    return figures


def of_all_pairs(study: Study, arm: str, rate: float) -> dict[str, dict[str, Tensor]]:
    """What the students of an arm say; labels teach each student once, whoever its teachers are."""
    if arm == "labels":
        of_student = {student: study.learned(student, None, arm, rate) for student in {s for s, _ in PAIRS.values()}}
        return {pair: of_student[student] for pair, (student, _) in PAIRS.items()}
    return {pair: study.learned(student, teacher, arm, rate) for pair, (student, teacher) in PAIRS.items()}


def gain(arm: str, kind: str) -> Callable[[Figures], float]:
    return lambda f: f[f"{arm}/{kind}"] - f[f"student/{kind}"]


def over(arm: str, other: str, kind: str) -> Callable[[Figures], float]:
    return lambda f: f[f"{arm}/{kind}"] - f[f"{other}/{kind}"]


def succeeded(arm: str) -> Callable[[Figures], float]:
    """The share of pairs whose student got better."""
    return lambda f: statistics.fmean(float(f[f"{arm}/{pair}"] > f[f"student/{pair}"]) for pair in PAIRS)


ARM_LABELS = {
    "student": "student as it was",
    "teacher": "teacher",
    "ensemble": "ensemble of both",
    "kl": "KL",
    "xekl": "XE-KL",
    "mcl": "XE-KL + MCL",
    "supervised": "KL + partition, by labels",
    "confidence": "KL + partition, by confidence",
    "labels": "fine-tuned on labels",
}

CLAIM = Claim(
    title="Knowledge transfer between any two models",
    paper=next(paper for paper in transfer.papers if paper.number == 19),
    sentence="What a weaker teacher knows better goes over to a student by distillation with a partition of the data, "
    "where plain distillation makes the student worse.",
    baselines=("plain KL distillation", "KL with cross-entropy", "MCL", "ensemble", "fine-tuning on the labels"),
    run=run,
    checks=(
        Check(
            "weak teachers: with a partition by labels the student gets better",
            gain("supervised", "weak"),
            0.01,
        ),
        Check(
            "weak teachers: a partition by labels is better than plain distillation",
            over("supervised", "kl", "weak"),
            0.02,
        ),
        Check(
            "weak teachers: a partition by confidence is better than plain distillation",
            over("confidence", "kl", "weak"),
            0.02,
        ),
        Check(
            "weak teachers: plain distillation makes the student worse",
            lambda f: -gain("kl", "weak")(f),
            0.005,
            decides=False,
        ),
        Check(
            "every teacher is right in 2 % of the images where its student is wrong",
            lambda f: min(f[f"positive/{pair}"] for pair in PAIRS),
            0.02,
            decides=False,
        ),
        Check(
            "strong teachers: with a partition by labels the student gets better",
            gain("supervised", "strong"),
            0.01,
            decides=False,
        ),
        Check(
            "control: a partition by labels brings more than fine-tuning on the labels, weak teachers",
            over("supervised", "labels", "weak"),
            0.005,
            decides=False,
        ),
        Check(
            "control: a partition by labels brings more than fine-tuning on the labels, strong teachers",
            over("supervised", "labels", "strong"),
            0.005,
            decides=False,
        ),
        Check(
            "more pairs succeed with a partition by labels than by plain distillation",
            lambda f: succeeded("supervised")(f) - succeeded("kl")(f),
            0.25,
            decides=False,
        ),
    ),
    plot=Plot(
        "Accuracy on digits under four changes, %",
        tuple(
            Row(label, f"{arm}/{kind}", f"{kind} teachers")
            for kind in ("weak", "strong")
            for arm, label in ARM_LABELS.items()
        ),
    ),
)
