"""The zoo's masked language model of code goes on with a little text of a domain that it has never seen, modules about
the internet, and its encoder is then fine-tuned to two tasks of that domain with few labels. Ways to go on, from the
same base, with the same rate and batches:

- not at all;
- further pre-training for T steps, for 2 T (as many as self-distillation takes in its two stages), for 4 T;
- self-distillation: T steps further, then T steps from the base again, near what the first run says of whole texts;
- the control: T steps near what the base itself says, which regularises as strongly and teaches nothing.

Texts here have no token that stands for the whole, so that means over tokens are compared. The rate of fine-tuning is
chosen on validation data from the same two by each way and task; all ways go on with one rate. Vision, on which the
paper finds most, is left out: masked auto-encoders that are small enough for a laptop learn too little of tiny images.

In a pilot (seed 100, 20,000 tokens, 3 runs of fine-tuning) longer further pre-training did not overfit, and runs
differed by more than ways do; hence fewer tokens and more runs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from claims import code_tasks, corpus, text, zoo
from claims import language_models as lm
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.self_distil import WHOLE, SelfDistillation
from regraft.train.methods.self_distil import self_distil
from regraft.train.objective import Sum, Term
from regraft.train.schedule import factor, parameter_groups
from regraft.train.teacher import Teacher

RATE, BATCH = 1e-3, 16
TOKENS = 5_000  # of the domain, without labels: a two-hundredth of what the base has seen
# T, steps of fine-tuning, runs of fine-tuning.
SIZES = {"laptop": (150, 100, 5), "smoke": (2, 2, 1)}


class Adapting:
    """Ways to go on from one base with one small text."""

    def __init__(self, seed: int, scale: str) -> None:
        self.seed = seed
        self.steps, self.tuning, self.runs = SIZES[scale]
        path = zoo.encoder(seed=seed, scale=scale)
        self.base = transformers.AutoModelForMaskedLM.from_pretrained(path).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.mask = tokenizer.mask_token_id
        files, held = corpus.split(True, seed, text.share(scale))
        self.ids = lm.encoded(tokenizer, [source.text for source in files])[:TOKENS]
        self.tasks = {
            "packages": code_tasks.packages(tokenizer, files, seed, 100),
            "kinds": code_tasks.kinds(tokenizer, held, seed, 60),
        }

    def go_on(self, steps: int, teacher: Any = None) -> Any:
        """The base after so many steps, near a teacher if there is one; trained as the method does by default."""
        model = copy.deepcopy(self.base)
        terms: list[tuple[float, Term]] = [(1.0, OwnLoss())]
        if teacher is not None:
            terms.append((1.0, SelfDistillation(Teacher(copy.deepcopy(teacher.base_model)), "mean")))
        objective = Sum(lambda examples, seeds: {}, terms)
        objective.prepare(model)
        draws = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        optimizer = torch.optim.AdamW(parameter_groups(model, RATE, 0.01, 1.0), betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor("linear", step, steps))
        model.train()
        for _ in range(steps):
            masked = zoo.masked(self.ids, code_tasks.LENGTH, BATCH, draws, self.mask)
            rows = torch.where(masked["labels"] == lm.IGNORED, masked["input_ids"], masked["labels"])
            loss, _ = objective.loss(model, {**masked, WHOLE: {"input_ids": rows}})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return model.eval()

    def moved(self, model: Any) -> float:
        """How far the encoder is from that of the base."""
        there = dict(model.base_model.named_parameters())
        squares = [((p - there[n]) ** 2).sum() for n, p in self.base.base_model.named_parameters()]
        return float(torch.stack(squares).sum().detach().sqrt())


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
    figures = {f"moved/{name}": ways.moved(model) for name, model in models.items() if name != "none"}
    for name, model in models.items():
        found = code_tasks.examined(model.base_model, ways.tasks, ways.tuning, ways.runs)
        figures |= {f"{task}/{name}": value for task, value in found.items()}
    return figures


def gain(figures: Figures, other: str) -> float:
    return figures["mean/self-distilled"] - figures[f"mean/{other}"]


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
            lambda f: f["mean/further"] - f["mean/further, four times"],
            0.0,
            beyond=-0.01,
            decides=False,
        ),
        Check("better than its own teacher", lambda f: gain(f, "further"), 0.01, decides=False),
        Check("better than staying near the base", lambda f: gain(f, "near the base"), 0.01, decides=False),
    ),
    plot=Plot(
        "Macro F1 after fine-tuning, %",
        tuple(
            Row(label, f"{task}/{name}", group)
            for task, group in (("packages", "package of a function"), ("kinds", "kind of a token"))
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
