"""A masked auto-encoder that was pre-trained on generated strokes goes on with 300 digits without labels, and its
encoder is then fine-tuned on 50 of them with labels. Ways to go on, from the same base, with the same rate and batches:

- not at all;
- further pre-training for T steps, for 2 T (as many as self-distillation takes in its two stages), for 4 T;
- self-distillation: T steps further, then T steps from the base again, near what the first run says of whole images;
- the control: T steps near what the base itself says, which regularises as strongly and teaches nothing.

The rate of fine-tuning is chosen on validation images, from the same three for each way, over three draws of 50 labels;
the test images are looked at with the chosen one. The rate of further pre-training was chosen for plain further
pre-training, on seeds that are not reported, and holds for all. The paper's text experiments are left out.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
import transformers
from torch import Tensor

from claims import glyphs
from claims.language_models import fit as fit_classifier
from claims.shared import best, grid
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.self_distil import WHOLE, SelfDistillation
from regraft.train.masked_images import whole
from regraft.train.methods.self_distil import self_distil
from regraft.train.objective import Objective, Sum
from regraft.train.schedule import factor, parameter_groups
from regraft.train.teacher import Teacher

IMAGES, LABELS, BATCH = 300, 50, 64
RATE = 1e-3
# T, steps of fine-tuning, draws of labels
SIZES = {"laptop": (400, 120, 3), "smoke": (2, 2, 1)}
RATES = (3e-4, 1e-3, 3e-3)


class Adapting:
    """Ways to go on from one base with one set of images."""

    def __init__(self, seed: int, scale: str) -> None:
        self.seed = seed
        self.base = glyphs.read(glyphs.auto_encoder(seed=seed, scale=scale))
        self.parts = glyphs.splits(seed, IMAGES)
        self.steps, self.tuning, self.draws = SIZES[scale]

    def go_on(self, steps: int, teacher: Any = None) -> Any:
        """The base after so many steps on the images, near a teacher if there is one."""
        model = copy.deepcopy(self.base)
        terms: list[tuple[float, Any]] = [(1.0, OwnLoss())]
        if teacher is not None:
            terms.append((1.0, SelfDistillation(Teacher(copy.deepcopy(teacher.base_model)))))
        objective = Sum(lambda examples, seeds: {}, terms)
        objective.prepare(model)
        self._train(model, objective, steps)
        return model

    def _train(self, model: Any, objective: Objective, steps: int) -> None:
        """As the defaults of the method: AdamW with betas 0.9 and 0.95, no clipping, a rate that falls linearly."""
        images = self.parts["target"].images
        draws = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(parameter_groups(model, RATE, 0.01, 1.0), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor("linear", step, steps))
        model.train()
        for _ in range(steps):
            chosen = images[torch.randint(len(images), (BATCH,), generator=draws)]
            seeds = torch.randint(2**40, (BATCH,), generator=draws).tolist()
            batch = {**glyphs.hidden(model, chosen, seeds), WHOLE: whole(model, chosen)}
            loss, _ = objective.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()

    def moved(self, model: Any) -> float:
        """How far the encoder is from that of the base."""
        there = dict(model.vit.named_parameters())
        return float(sum(((p - there[n]) ** 2).sum() for n, p in self.base.vit.named_parameters()).detach() ** 0.5)

    def accuracy(self, model: Any) -> float:
        """On the test images, with the rate of fine-tuning that is best on validation images."""
        chosen, _ = best(grid(rate=RATES), lambda rate: self._tuned(model, rate, "validation"))
        return self._tuned(model, chosen["rate"], "test")

    def _tuned(self, model: Any, rate: float, part: str) -> float:
        found = []
        for draw in range(self.draws):
            classifier = self._fine_tuned(model, rate, draw)
            asked = self.parts[part]
            with torch.inference_mode():
                guesses = classifier(pixel_values=asked.images).logits.argmax(-1)
            found.append(float((guesses == asked.labels).float().mean()))
        return statistics.fmean(found)

    def _fine_tuned(self, model: Any, rate: float, draw: int) -> Any:
        target = self.parts["target"]
        draws = torch.Generator().manual_seed(100 * self.seed + draw)
        mine = torch.randperm(IMAGES, generator=draws)[:LABELS]
        images, labels = target.images[mine], target.labels[mine]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
        sizes = {name: getattr(model.config, name) for name in (*names, "patch_size", "num_channels")}
        torch.manual_seed(draw)
        classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=10))
        classifier.vit.load_state_dict(model.vit.state_dict())

        def batch(_: int) -> dict[str, Tensor]:
            picked = torch.randint(LABELS, (32,), generator=draws)
            return {"pixel_values": images[picked], "labels": labels[picked]}

        fit_classifier(classifier, batch, self.tuning, rate)
        return classifier


def run(seed: int, scale: str) -> Figures:
    ways = Adapting(seed, scale)
    steps = ways.steps
    further = ways.go_on(steps)
    models = {
        "none": ways.base,
        "further": further,
        "further, twice": ways.go_on(2 * steps),
        "further, four times": ways.go_on(4 * steps),
        "self-distilled": ways.go_on(steps, further),
        "near the base": ways.go_on(steps, ways.base),
    }
    figures = {f"accuracy/{name}": ways.accuracy(model) for name, model in models.items()}
    figures |= {f"moved/{name}": ways.moved(model) for name, model in models.items() if name != "none"}
    return figures


def gain(figures: Figures, *others: str) -> float:
    return figures["accuracy/self-distilled"] - max(figures[f"accuracy/{other}"] for other in others)


CLAIM = Claim(
    title="Self-distillation for further pre-training",
    paper=next(paper for paper in self_distil.papers if paper.number == 13),
    sentence="Further pre-training on a small domain, regularised by its own first run, gives a better model to"
    " fine-tune than plain further pre-training of the same length, or none.",
    baselines=("fine-tuning alone", "further pre-training for T, 2 T and 4 T steps", "T steps near the base"),
    run=run,
    checks=(
        Check("better than further pre-training with as many steps", lambda f: gain(f, "further, twice"), 0.01),
        Check("better than fine-tuning alone", lambda f: gain(f, "none"), 0.01),
        Check(
            "nearer to the base than further pre-training with as many steps",
            lambda f: 1 - f["moved/self-distilled"] / f["moved/further, twice"],
            0.0,
        ),
        Check(
            "premise: further pre-training overfits: four times as many steps are no better",
            lambda f: f["accuracy/further"] - f["accuracy/further, four times"],
            0.0,
            beyond=-0.01,
            decides=False,
        ),
        Check("better than its own teacher", lambda f: gain(f, "further"), 0.01, decides=False),
        Check("better than staying near the base", lambda f: gain(f, "near the base"), 0.01, decides=False),
    ),
    plot=Plot(
        "Accuracy on digits after fine-tuning on 50 labels, %",
        tuple(
            Row(label, f"accuracy/{name}")
            for label, name in (
                ("fine-tuning alone", "none"),
                ("further pre-training, T", "further"),
                ("further pre-training, 2 T", "further, twice"),
                ("further pre-training, 4 T", "further, four times"),
                ("near the base", "near the base"),
                ("self-distillation", "self-distilled"),
            )
        ),
    ),
)
