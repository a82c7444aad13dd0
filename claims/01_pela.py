"""Four pre-trained models lose 1/3, 1/2 and 2/3 of the parameters of their linear layers (ratios of 1.5, 2 and 3), and
then learn a task from few labels: parity of digits, the package that a passage of code is from, the caption of an
image, the text of a docstring's summary. Three of them are the zoo's, the last is the published MiniLM encoder.

Every arm takes the same number of steps in all. PELA starts from the truncated SVD, is pre-trained next to the original
(its own loss, features with weight 1, perturbation with weight 1 and eps 0.001, as published), and is fine-tuned.
`SVD` spends all steps on fine-tuning. `SVD + distillation` is pre-trained by features alone. `from scratch` is the same
small architecture from random weights, pre-trained with the model's own loss. `original` is fine-tuned as PELA is.

Learning rates were chosen with seed 100, at a ratio of 2, on validation data, from three for each arm (`tuned`): of the
first stage for arms with two, whose second stage has the rate of the original.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from claims.compression import SETTINGS, Setting
from regraft.claims.claim import Check, Claim, Figures, Plot, Row
from regraft.objectives.features import Features
from regraft.objectives.perturbation import Perturbation
from regraft.resize.cost import parameters
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.methods.pela import pela
from regraft.train.feature_cache import FeatureCache
from regraft.train.loop import train
from regraft.train.objective import Sum, Term
from regraft.train.options import TrainOptions
from regraft.train.teacher import Teacher

RATIOS = {"1.5": 1.5, "2": 2.0, "3": 3.0}
BASELINES = {"svd": "SVD + fine-tuning", "distillation": "SVD + distillation", "scratch": "a small model from scratch"}
ARMS = (*BASELINES, "pela")
EVERY = 4  # steps between two that compute the penalty on perturbations, which is weighted by as much
# Rates to choose from, of fine-tuning alone and of pre-training, and what was chosen for each arm.
TRIES = {
    "fine-tuning": {"MiniLM": (5e-5, 2e-4, 6e-4), "others": (3e-4, 1e-3, 3e-3)},
    "pre-training": {"MiniLM": (2e-4, 6e-4, 2e-3), "others": (6e-4, 2e-3, 6e-3)},
}
RATES = {
    "vision": {"original": 1e-3, "svd": 1e-3, "distillation": 2e-3, "scratch": 2e-3, "pela": 2e-3},
    "text": {"original": 1e-3, "svd": 1e-3, "distillation": 2e-3, "scratch": 2e-3, "pela": 2e-3},
    "pairs": {"original": 1e-3, "svd": 1e-3, "distillation": 2e-3, "scratch": 2e-3, "pela": 2e-3},
    "MiniLM": {"original": 2e-4, "svd": 2e-4, "distillation": 6e-4, "scratch": 6e-4, "pela": 6e-4},
}


class Arms:
    """All arms on one model."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self._folder = setting, folder
        self.kept: dict[str, float] = {}  # share of the model's parameters, by ratio
        # The batches of pre-training are the same for all arms, so what the teacher says of them is kept.
        self._teacher = Teacher(setting.load(), cache=FeatureCache(folder, "teacher") if setting.cached else None)

    def score(self, arm: str, ratio: str, rate: float, fine_tuning: float, part: str = "test") -> float:
        """Of the task; `rate` is that of the first stage, `fine_tuning` that of the second where there are two."""
        size = self.setting.size
        if arm == "original":
            return self.setting.score(self.setting.fine_tune(self.setting.load(), size.fine_tuning, rate), part)
        model = self.setting.load()
        dense = parameters(model)
        if arm == "scratch":
            torch.manual_seed(self.setting.seed)
            model = type(model)._from_config(copy.deepcopy(model.config))
        factorise(model, LowRankOptions(ratio=RATIOS[ratio]))
        self.kept[ratio] = parameters(model) / dense
        if arm == "svd":
            steps, fine_tuning = size.pretraining + size.fine_tuning, rate
        else:
            self._pretrain(model, arm, rate)
            steps = size.fine_tuning
        return self.setting.score(self.setting.fine_tune(model, steps, fine_tuning), part)

    def _pretrain(self, model: Any, arm: str, rate: float) -> None:
        own, features = (1.0, self.setting.own), (1.0, Features())
        perturbation = (float(EVERY), Perturbation(1e-3, every=EVERY))
        terms: dict[str, list[tuple[float, Term]]] = {
            "distillation": [features],
            "scratch": [own],
            "pela": [own, features, perturbation],
        }
        steps = self.setting.size.pretraining
        options = TrainOptions(
            max_steps=steps, per_device_train_batch_size=1, learning_rate=rate, warmup_ratio=0.1, shuffle=False,
            save_steps=0, logging_steps=steps, seed=self.setting.seed,
        )  # fmt: skip
        objective = Sum(self.setting.collate, terms[arm], self._teacher if arm != "scratch" else None)
        with tempfile.TemporaryDirectory() as checkpoints:
            train(model, objective, [{}] * steps, options, folder=checkpoints, device="cpu")


def run(seed: int, scale: str) -> Figures:
    figures: dict[str, float] = {}
    for name, setting in SETTINGS.items():
        rates = RATES[name]
        with tempfile.TemporaryDirectory() as folder:
            arms = Arms(setting(seed, scale), Path(folder))
            figures[f"original/{name}"] = arms.score("original", "", rates["original"], 0.0)
            for arm in ARMS:
                for ratio in RATIOS:
                    figures[f"{arm}/{name}/{ratio}"] = arms.score(arm, ratio, rates[arm], rates["original"])
            figures |= {f"parameters kept/{name}/{ratio}": share for ratio, share in arms.kept.items()}
    return figures


def tuned(seed: int = 100, names: Sequence[str] = tuple(SETTINGS)) -> dict[str, dict[str, dict[float, float]]]:
    """What each rate gives on validation data at a ratio of 2: what `RATES` were chosen by."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            arms = Arms(SETTINGS[name](seed, "laptop"), Path(folder))
            found[name] = {}
            best = 0.0
            for arm in ("original", *ARMS):
                stage = TRIES["fine-tuning" if arm in ("original", "svd") else "pre-training"]
                rates = stage.get(name, stage["others"])
                found[name][arm] = {rate: arms.score(arm, "2", rate, best, "validation") for rate in rates}
                best = best or max(rates, key=found[name][arm].__getitem__)
    return found


def gain(
    f: Figures, baseline: str, names: Sequence[str] = tuple(SETTINGS), ratios: Sequence[str] = tuple(RATIOS)
) -> float:
    """By how much PELA is better, on average over some models and ratios."""
    return statistics.fmean(f[f"pela/{n}/{r}"] - f[f"{baseline}/{n}/{r}"] for n in names for r in ratios)


def against_original(f: Figures, names: Sequence[str], ratio: str) -> float:
    return statistics.fmean(f[f"pela/{n}/{ratio}"] - f[f"original/{n}"] for n in names)


REMOVED = {"1.5": "1/3", "2": "1/2", "3": "2/3"}

CLAIM = Claim(
    title="PELA",
    paper=pela.papers[0],
    sentence="After intermediate pre-training next to the original, a low-rank model that has lost 1/3 to 2/3 of the "
    "parameters of its linear layers is better than its baselines, and nearly as good as the original.",
    baselines=tuple(BASELINES.values()),
    run=run,
    checks=(
        *(
            Check(
                f"{name}: better than {said}, mean over ratios",
                lambda f, b=baseline, n=name: gain(f, b, [n]),  # type: ignore[misc]
                0.005,
            )
            for name in SETTINGS
            for baseline, said in BASELINES.items()
        ),
        *(
            Check(
                f"{REMOVED[ratio]} removed: better than {said}, mean over models",
                lambda f, b=baseline, r=ratio: gain(f, b, ratios=[r]),  # type: ignore[misc]
                0.005,
            )
            for ratio in RATIOS
            for baseline, said in BASELINES.items()
        ),
        *(
            Check(
                f"{name}: at most 1.5 points below the original with 1/2 removed",
                lambda f, n=name: against_original(f, [n], "2"),  # type: ignore[misc]
                -0.015,
                beyond=-0.015,
            )
            for name in SETTINGS
        ),
        *(
            Check(
                f"{REMOVED[ratio]} removed: at most 0.6 points below the original, mean over models",
                lambda f, r=ratio: against_original(f, tuple(SETTINGS), r),  # type: ignore[misc]
                -0.006,
                beyond=-0.006,
                decides=False,
            )
            for ratio in RATIOS
        ),
    ),
    plot=Plot(
        "Right answers after fine-tuning, %",
        tuple(
            row
            for name in SETTINGS
            for row in (
                Row("original", f"original/{name}", name),
                *(Row(f"{said}, 1/2 removed", f"{arm}/{name}/2", name) for arm, said in BASELINES.items()),
                *(Row(f"PELA, {REMOVED[ratio]} removed", f"pela/{name}/{ratio}", name) for ratio in RATIOS),
            )
        ),
    ),
)
