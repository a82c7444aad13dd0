"""A small vision transformer (a few thousand parameters) learns to read digits. 100 images have labels; a teacher that
was trained on all 1132 labelled ones stands by. Two arms use the labels, for 250 steps and for 750. The others never
see one: they learn the teacher's soft labels on the same 100 images, or also on what the teacher chose, 60 of each
class at most, from a pool of 1474 images that are unlabelled for the student: the other 1032, and as junk (30 %) images
whose pixels are shuffled, or inverted and shuffled.

All arms see their images, 32 in a batch, with the same kind of noise, and each chooses its learning rate from the same
two by 305 validation images. Also told: how much junk the choice lets through, against drawing at random; what the
short training on the 100 images brings; and the symmetric divergence of the paper's code against plain soft
cross-entropy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from claims import vision
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.objectives.logits import Kind, Logits
from regraft.objectives.own_loss import OwnLoss
from regraft.resize.surgery import load
from regraft.train.batches import DataOptions
from regraft.train.loop import train
from regraft.train.methods.ssld import ssld
from regraft.train.objective import Sum, Term
from regraft.train.options import TrainOptions
from regraft.train.selection import Pool, Selection, select
from regraft.train.teacher import Teacher
from regraft.train.views import AugmentOptions, seen_by_both

LABELLED, CLASSES, JUNK = 100, 10, 0.3
# (width, steps, rows per class)
SIZES = {"laptop": (16, 250, 60), "smoke": (8, 2, 5)}
RATES = (3e-3, 1e-2)
NOISE = AugmentOptions(noise=0.2)
Rows = list[dict[str, Any]]


def rows_of(images: torch.Tensor, labels: torch.Tensor | None = None) -> Rows:
    rows: Rows = [{"pixel_values": image.numpy()} for image in images]
    return rows if labels is None else [row | {"label": int(n)} for row, n in zip(rows, labels, strict=True)]


def junk(images: torch.Tensor, count: int, draws: torch.Generator) -> torch.Tensor:
    """Images whose pixels are shuffled, every second one inverted before: as much ink as digits, or as paper."""
    chosen = images[torch.randint(len(images), (count,), generator=draws)]
    chosen = torch.where((torch.arange(count) % 2 == 0).view(-1, 1, 1, 1), chosen, vision.inverted(chosen))
    orders = torch.stack([torch.randperm(64, generator=draws) for _ in range(count)])
    return chosen.flatten(1).gather(1, orders).view_as(chosen)


def collate(examples: Sequence[Any], seeds: Sequence[int]) -> dict[str, torch.Tensor]:
    batch = {"pixel_values": torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])}
    if "label" in examples[0]:
        batch["labels"] = torch.tensor([example["label"] for example in examples])
    return batch


class Students:
    """The arms of one seed: students that begin alike, trained on rows with a loss."""

    def __init__(self, seed: int, scale: str) -> None:
        self.seed, self.rates = seed, RATES if scale != "smoke" else RATES[:1]
        self.width, self.steps, self.per_class = SIZES[scale]
        self.teacher = load(vision.digits_vit(seed=seed, scale=scale, width=32))
        parts = vision.splits(seed, scale)
        train, draws = parts["train"], torch.Generator().manual_seed(seed)
        own, rest = train.images[:LABELLED], train.images[LABELLED:]
        made = junk(rest, round(len(rest) * JUNK / (1 - JUNK)), draws)
        order = torch.randperm(len(rest) + len(made), generator=draws)
        self.labelled = rows_of(own, train.labels[:LABELLED])
        self.plain = rows_of(own)
        self.pool = rows_of(torch.cat([rest, made])[order])
        self.is_junk = (order >= len(rest)).tolist()
        self.validation, self.test = parts["validation"], parts["test"]

    def begun(self) -> transformers.ViTForImageClassification:
        size = vision.training.Scale(None, self.width, 1, 0, 0)
        return vision.training.build(size, 7919 * self.seed + 1)

    def best(self, make: Callable[[float], Any]) -> Any:
        """Of the students that `make` makes at these rates, the better one on validation images."""
        made = [make(rate) for rate in self.rates]
        return max(made, key=lambda model: vision.accuracy(model, self.validation.images, self.validation.labels))

    def taught(self, rows: Rows, term: Term, times: int = 1, start: Any = None, slower: float = 1.0) -> Any:
        """A student that is trained on rows for `times` the usual steps."""

        def make(rate: float) -> Any:
            model = self.begun()
            if start is not None:
                model.load_state_dict(start.state_dict())
            teacher = Teacher(self.teacher) if term.needs_teacher else None
            options = TrainOptions(
                learning_rate=rate / slower, max_steps=max(1, self.steps * times // (12 if start is not None else 1)),
                per_device_train_batch_size=32, warmup_ratio=0.05, weight_decay=1e-3, seed=self.seed, save_steps=0,
            )  # fmt: skip
            objective = Sum(seen_by_both(collate, None, NOISE), [(1.0, term)], teacher)
            with tempfile.TemporaryDirectory() as folder:
                train(model, objective, rows, options, folder=folder, device="cpu")
            return model

        return self.best(make)

    def score(self, model: Any) -> float:
        return vision.accuracy(model, self.test.images, self.test.labels)

    def selected(self) -> Selection:
        pool = Pool(self.pool, Path("pool"), DataOptions())
        seen = Pool(self.plain, Path("data"), DataOptions())
        return select(Teacher(self.teacher), collate, pool, self.per_class, seen=seen)


def run(seed: int, scale: str) -> Figures:
    arms = Students(seed, scale)
    loss: Kind = "sym_kl"
    chosen = arms.selected()
    draws = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randperm(len(arms.pool), generator=draws)[: len(chosen.rows)].tolist()
    mined = arms.plain + [arms.pool[i] for i in chosen.rows]
    long = arms.taught(mined, Logits(loss), 3)
    finished = arms.taught(arms.plain, Logits(loss), 3, start=long, slower=100)
    figures = {
        "teacher": arms.score(arms.teacher),
        "labels": arms.score(arms.taught(arms.labelled, OwnLoss())),
        "labels, longer": arms.score(arms.taught(arms.labelled, OwnLoss(), 3)),
        "soft labels": arms.score(arms.taught(arms.plain, Logits(loss))),
        "soft labels, longer": arms.score(arms.taught(arms.plain, Logits(loss), 3)),
        "chosen, longer": arms.score(long),
        "chosen, longer, finished": arms.score(finished),
        "chosen, soft cross-entropy": arms.score(arms.taught(mined, Logits("soft_ce"), 3)),
        "drawn, longer": arms.score(arms.taught(arms.plain + [arms.pool[i] for i in drawn], Logits(loss), 3)),
        "junk chosen": sum(arms.is_junk[i] for i in chosen.rows) / max(1, len(chosen.rows)),
        "junk drawn": sum(arms.is_junk[i] for i in drawn) / max(1, len(drawn)),
    }
    return figures


CLAIM = Claim(
    title="SSLD",
    paper=next(paper for paper in ssld.papers if paper.number == 73),
    sentence="A small classifier that learns a teacher's soft labels on images that the teacher chose, none of them "
    "labelled, is better than one that is trained on labels, also for as long.",
    baselines=("labels, as long", "labels, a third as long", "soft labels on the labelled images alone"),
    run=run,
    checks=(
        Check(
            "on the same images and for as long, soft labels without any label are at most a point worse than labels",
            lambda f: f["soft labels"] - f["labels"],
            -0.01,
            beyond=-0.01,
        ),
        Check(
            "chosen unlabelled images and three times the steps beat labels with three times the steps",
            lambda f: f["chosen, longer"] - f["labels, longer"],
            0.02,
        ),
        Check(
            "the chosen images, and not the length alone, bring it",
            lambda f: f["chosen, longer"] - f["soft labels, longer"],
            0.02,
        ),
        Check(
            "choosing: of the rows that the teacher chose far fewer are junk than of rows drawn",
            lambda f: f["junk drawn"] - f["junk chosen"],
            0.2,
        ),
        Check(
            "rows that the teacher chose teach better than as many that are drawn",
            lambda f: f["chosen, longer"] - f["drawn, longer"],
            0.002,
            decides=False,
        ),
        Check(
            "the short training on the 100 images helps",
            lambda f: f["chosen, longer, finished"] - f["chosen, longer"],
            0.002,
            decides=False,
        ),
        Check(
            "the symmetric divergence is better than soft cross-entropy",
            lambda f: f["chosen, longer"] - f["chosen, soft cross-entropy"],
            0.002,
            decides=False,
        ),
    ),
    plot=Plot(
        "Accuracy on digits, %",
        (
            Row("teacher", "teacher", "all labels"),
            Row("250 steps", "labels", "100 images, labels"),
            Row("750 steps", "labels, longer", "100 images, labels"),
            Row("250 steps", "soft labels", "100 images, soft labels"),
            Row("750 steps", "soft labels, longer", "100 images, soft labels"),
            Row("750 steps", "chosen, longer", "and those the teacher chose"),
            Row("750 steps, finished on the 100", "chosen, longer, finished", "and those the teacher chose"),
            Row("750 steps, soft cross-entropy", "chosen, soft cross-entropy", "and those the teacher chose"),
            Row("750 steps", "drawn, longer", "and as many drawn"),
        ),
    ),
)
