"""One vision transformer that reads upright digits is fine-tuned 16 times on 300 images of one hard distortion, a fifth
of whose labels are wrong: at random learning rates, lengths, weight decays and label smoothings, and in other orders.
The uniform soup of all 16 is compared with the mean and the median of them, and with the best on validation images.

Also told: the soup that is grown greedily on validation images; the same sweep with right labels; and a control that
must fail, the average of runs that do not start from one model.
"""

from __future__ import annotations

import statistics

import torch

from claims import vision
from claims.shared import State
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.claims.paper_scale import Inputs, tuned_merges
from regraft.merge.rules.linear import linear

RUNS = 16
IMAGES = 300


def target(images: torch.Tensor) -> torch.Tensor:
    """Shifted, blurred and dimmed: what the base reads badly."""
    return vision.blurred(vision.digits.shifted(images))


class Sweep:
    """Fine-tunes of one base on the target, with hyper-parameters that are drawn."""

    def __init__(self, seed: int, scale: str) -> None:
        self.seed, self.scale = seed, scale
        self.runs = RUNS if scale != "smoke" else 3
        self.base = vision.digits_vit(seed=seed, scale=scale)
        self.model = vision.load(self.base)
        parts = vision.splits(seed, scale)
        self.train = (target(parts["train"].images[:IMAGES]), parts["train"].labels[:IMAGES])
        self.parts = {name: (target(part.images), part.labels) for name, part in parts.items() if name != "train"}

    def score(self, state: State, part: str) -> float:
        self.model.load_state_dict(state)
        return vision.accuracy(self.model, *self.parts[part])

    def fine_tunes(self, wrong: float, *, one_start: bool = True, count: int | None = None) -> list[State]:
        """`count` runs; a share `wrong` of the labels, the same for all runs, is drawn at random."""
        draws = torch.Generator().manual_seed(1000 + self.seed)
        images, right = self.train
        drawn = torch.randint(0, 10, right.shape, generator=draws)
        labels = torch.where(torch.rand(right.shape, generator=draws) < wrong, drawn, right)
        return [self._fine_tune(images, labels, one_start, number) for number in range(count or self.runs)]

    def _fine_tune(self, images: torch.Tensor, labels: torch.Tensor, one_start: bool, number: int) -> State:
        draws = torch.Generator().manual_seed(7919 * self.seed + number)
        a, b, c, d = torch.rand(4, generator=draws).tolist()
        rate, decay, smoothing = 10 ** (-3.6 + 0.8 * a), 10 ** (-4 + 3 * b), (0.0, 0.1, 0.2)[int(3 * c)]
        epochs = 6 + int(7 * d) if self.scale != "smoke" else 1
        model = vision.load(self.base)
        if not one_start:
            torch.manual_seed(number)
            model = type(model)(model.config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=draws).split(64):
                noise = 0.15 * torch.randn(images[batch].shape, generator=draws)
                logits = model(pixel_values=images[batch] + noise).logits
                loss = torch.nn.functional.cross_entropy(logits, labels[batch], label_smoothing=smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def greedy(states: list[State], sweep: Sweep) -> tuple[State, int]:
    """Best first, each next one kept if validation accuracy does not fall; and how many were kept."""
    order = sorted(range(len(states)), key=lambda i: -sweep.score(states[i], "validation"))
    kept = [states[order[0]]]
    top = sweep.score(kept[0], "validation")
    for i in order[1:]:
        value = sweep.score(linear([*kept, states[i]]), "validation")
        if value >= top:
            kept, top = [*kept, states[i]], value
    return linear(kept), len(kept)


def soups(states: list[State], sweep: Sweep) -> dict[str, float]:
    singles = [sweep.score(state, "test") for state in states]
    chosen = max(states, key=lambda state: sweep.score(state, "validation"))
    soup, ingredients = greedy(states, sweep)
    return {
        "mean single": statistics.fmean(singles),
        "median single": statistics.median(singles),
        "best on validation": sweep.score(chosen, "test"),
        "uniform": sweep.score(linear(states), "test"),
        "greedy": sweep.score(soup, "test"),
        "ingredients": float(ingredients),
    }


def run(seed: int, scale: str) -> Figures:
    sweep = Sweep(seed, scale)
    figures = {"base": sweep.score(vision.state_of(sweep.base), "test")}
    figures.update({f"{name}/noisy": value for name, value in soups(sweep.fine_tunes(0.2), sweep).items()})
    figures.update({f"{name}/clean": value for name, value in soups(sweep.fine_tunes(0.0), sweep).items()})
    apart = sweep.fine_tunes(0.0, one_start=False, count=min(4, sweep.runs))
    figures["mean single/apart"] = statistics.fmean(sweep.score(state, "test") for state in apart)
    figures["uniform/apart"] = sweep.score(linear(apart), "test")
    return figures


def at_paper_scale(seed: int, inputs: Inputs) -> Figures:
    """The experts are the runs of a sweep; give each the same data."""
    found = tuned_merges(seed, inputs, {"uniform": {"merge": "linear"}})
    return {"base": found["base"], "mean single/noisy": found["expert"], "uniform/noisy": found["uniform"]}


CLAIM = Claim(
    title="Model soups",
    paper=next(paper for paper in linear.papers if paper.number == 28),
    sentence="The average of all runs of a hyper-parameter sweep is better than its mean run.",
    baselines=("mean single run", "median single run", "best single run on validation data"),
    run=run,
    at_paper_scale=at_paper_scale,
    checks=(
        Check(
            "noisy labels: the uniform soup is better than the mean run",
            lambda f: f["uniform/noisy"] - f["mean single/noisy"],
            0.005,
        ),
        Check(
            "right labels: the uniform soup is better than the mean run",
            lambda f: f["uniform/clean"] - f["mean single/clean"],
            0.005,
            decides=False,
        ),
        Check(
            "noisy labels: the greedy soup is better than the best run on validation images",
            lambda f: f["greedy/noisy"] - f["best on validation/noisy"],
            0.005,
            decides=False,
        ),
        Check(
            "control: without a common start the average is worse than the mean run",
            lambda f: f["mean single/apart"] - f["uniform/apart"],
            0.1,
            decides=False,
        ),
    ),
    plot=Plot(
        "Accuracy on the target, %",
        (
            Row("base", "base", "before"),
            *(
                Row(label, f"{name}/{kind}", group)
                for kind, group in (("noisy", "a fifth of the labels wrong"), ("clean", "right labels"))
                for label, name in (
                    ("mean run", "mean single"),
                    ("best on validation", "best on validation"),
                    ("greedy soup", "greedy"),
                    ("uniform soup", "uniform"),
                )
            ),
            Row("mean run", "mean single/apart", "runs from different starts"),
            Row("uniform soup", "uniform/apart", "runs from different starts"),
        ),
    ),
)
