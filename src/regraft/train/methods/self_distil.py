"""Further pre-training on a domain, and then again from the start, near what the first run made of the domain.

1. Further pre-training: from the model, minimise its own pre-training loss on `data`: the teacher f_T.
2. Self-distillation: from the model AGAIN, not from the teacher, minimise

       L = L_own(masked x) + distil_weight |f(x) - f_T(x)|^2        x whole in the second term, f_T frozen

   f is the encoder's last hidden state, of the first token where that stands for the whole input (see `target`).
3. With `rounds` above 1 the result teaches the next round, which begins from the model as well.

Needs unlabelled data and a model with its pre-training head: masked images (ViT-MAE, or ViT, DeiT and Swin with a mask
token) or masked tokens (BERT, RoBERTa); next tokens too, which the paper does not try. Only the encoder of the teacher
is used. Fine-tune the result: plain further pre-training can overfit a small domain, and this is to keep the model
nearer to where it started. How far each run moved the encoder is told, and recorded as `drift`.

`teacher` takes the place of the first stage: a model that was trained further from `model`, such as a step with
`train: fine_tune` on the same data. Options of training are those of each run; their defaults are those of the
published code for images (its runs have 20,000 steps of 64 images, and `norm_pix_loss`).

Departures from the published code: both losses are added before one pass backwards, which gives the same gradient;
the order of images and patches is drawn anew in each epoch from one seed for all runs. The paper's text experiments
were not published: for texts, too, the first token is compared, where the tokenizer puts one before each text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field

from regraft.axes.module_map import modules_of
from regraft.errors import UserError
from regraft.methods import Paper
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.self_distil import WHOLE, SelfDistillation, Target
from regraft.resize.surgery import load
from regraft.train.batches import DataOptions, batches_for
from regraft.train.feature_cache import FeatureCache
from regraft.train.loop import TrainResult, steps_of, train
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.masked_images import whole
from regraft.train.objective import Collate, Objective, Sum
from regraft.train.options import TrainOptions
from regraft.train.stages import Progress, joined
from regraft.train.start import Start, start
from regraft.train.teacher import CacheOptions, Teacher
from regraft.train.vocabulary import same_tokens

_KINDS = ("masked", "causal", "masked images")


class SelfDistilOptions(DataOptions, TrainOptions, CacheOptions):
    """Options of self_distil; those of training are for each run."""

    learning_rate: float = Field(1.5e-4, gt=0, le=10, description="the highest learning rate of AdamW")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_cooldown"] = Field(
        "linear", description="how the learning rate falls after the warm-up"
    )
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the mean of squared gradients")
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are scaled down to this norm; 0 leaves them")
    rounds: int = Field(1, ge=1, le=100, description="how often a student starts anew, taught by the one before")
    target: Literal["auto", "cls", "mean", "tokens"] = Field(
        "auto",
        description="what is compared: the first token, the mean of all, or each; auto is cls where inputs have a"
        " token that stands for the whole, else mean",
    )
    distil_weight: float = Field(1.0, gt=0, description="of the distance to the teacher")
    reduction: Literal["sum", "mean"] = Field("sum", description="squares are added over the width, or averaged")


@maker(
    room="train",
    summary="further pre-training on a domain, regularised by its own first run",
    options=SelfDistilOptions,
    roles={"teacher": False},
    runs=lambda options: int(options.rounds) + 1,
    papers=(
        Paper(
            title="Self-Distillation for Further Pre-training of Transformers",
            authors="Lee et al.",
            venue="ICLR 2023",
            arxiv="2210.02871",
            number=13,
        ),
    ),
)
def self_distil(work: Work[SelfDistilOptions]) -> Made:
    """Raises RG309 for a model without a pre-training loss, RG303 for a target that it does not have, and RG201, RG203,
    RG204 and RG212 for a teacher that was not trained from the model."""
    o = work.options
    begun = start(work)
    if not (begun.batches.has_loss and begun.batches.kind in _KINDS):
        what = f"a {type(begun.model).__name__} has no loss that needs no labels"
        raise UserError("RG309", what, fix="take the model with the head that it was pre-trained with")
    target = _target(begun, o.target)
    collate = _with_whole_inputs(work, begun)
    given = "teacher" in work.models
    runs = _Runs(work, o.rounds + (not given), begun.data)
    if given:
        teacher = load(work.models["teacher"]).float()
        _check_teacher(work, begun.model, teacher)
        runs.moved("teacher", begun.model, teacher)
    else:
        teacher = begun.model
        runs.go("further", teacher, Sum(begun.batches.collate, [(1.0, OwnLoss())]), begun.data)
        runs.moved("further pre-training", load(work.models["model"]), teacher)
    for number in range(1, o.rounds + 1):
        again = start(work)
        cache = FeatureCache(work.folder / f"features-{number}", work.key) if o.cache_teacher else None
        term = SelfDistillation(Teacher(teacher.base_model, cache=cache), target, o.reduction)
        runs.go(f"round-{number}", again.model, Sum(collate, [(1.0, OwnLoss()), (o.distil_weight, term)]), again.data)
        runs.moved(f"round {number}", load(work.models["model"]), again.model)
        teacher = again.model
    return Made(teacher.cpu().to(begun.dtype), runs.facts())


def _target(begun: Start, asked: str) -> Target:
    """What represents an input of this model; raises RG303 for `cls` where nothing stands for the whole."""
    if asked not in ("auto", "cls"):
        return cast(Target, asked)
    tokenizer = begun.batches.tokenizer
    if tokenizer is None:
        stands = modules_of(begun.model).first_token
    else:
        first = {tokenizer.cls_token_id, tokenizer.bos_token_id} - {None}
        stands = begun.batches.kind == "masked" and tokenizer("a")["input_ids"][0] in first
    if asked == "cls" and not stands:
        whose = "images have no such token" if tokenizer is None else "texts do not begin with one"
        family = begun.model.config.model_type
        what = f"target: cls compares a token that stands for the whole, and this {family}'s {whose}"
        raise UserError("RG303", what, fix="use target: mean")
    return "cls" if stands else "mean"


def _with_whole_inputs(work: Work[SelfDistilOptions], begun: Start) -> Collate:
    """Batches of masked inputs that hold the same inputs unmasked, too."""
    own, model = begun.batches.collate, begun.model
    if begun.batches.tokenizer is None:

        def images(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
            batch = own(examples, seeds)
            return {**batch, WHOLE: whole(model, batch["pixel_values"])}

        return images
    options = chosen(work.options, DataOptions)
    first = next(iter(begun.data))
    plain = batches_for(model, work.models["model"], first, options, data=work.data, labels=False).collate

    def texts(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        return {**own(examples, seeds), WHOLE: plain(examples, seeds)}

    return texts


def _check_teacher(work: Work[SelfDistilOptions], model: Any, teacher: Any) -> None:
    """Raise RG203 for another architecture, RG204 for another vocabulary, RG212 for the model itself."""
    if model.config.model_type != teacher.config.model_type:
        what = f"the model is a {model.config.model_type} and the teacher a {teacher.config.model_type}"
        raise UserError("RG203", what, fix="take a teacher that was trained from the model itself")
    same_tokens(work.models["model"], work.models["teacher"])
    SelfDistillation(Teacher(teacher.base_model)).prepare(model, None)
    others = dict(teacher.base_model.named_parameters())
    if all(torch.equal(value, others[name]) for name, value in model.base_model.named_parameters()):
        what = "model and teacher have the same weights, so that there is nothing to learn from"
        raise UserError("RG212", what, fix="give as model what the teacher was trained from")


class _Runs:
    """Runs of the loop one after the other, told as one, and what is known of them at the end."""

    def __init__(self, work: Work[SelfDistilOptions], runs: int, data: Any) -> None:
        self._work, self._options = work, chosen(work.options, TrainOptions)
        self._progress = Progress(work.tell, runs * steps_of(self._options, data))
        self._results: list[TrainResult] = []
        self._drift: dict[str, dict[str, float]] = {}

    def go(self, name: str, model: Any, objective: Objective, data: Any) -> None:
        """Train a model; a run that a former process has finished is not done again."""
        work, before = self._work, sum(result.steps for result in self._results)
        result = train(
            model, objective, data, self._options, folder=work.folder / name, key=f"{work.key} {name}",
            device=work.device, tell=self._progress.behind(before),
        )  # fmt: skip
        self._results.append(result)

    def moved(self, name: str, base: Any, model: Any) -> None:
        """Note how far an encoder is from where it began."""
        there = dict(model.base_model.named_parameters())
        moved = norms = 0.0
        for n, value in base.base_model.named_parameters():
            began = value.detach().float().cpu()
            moved += float((there[n].detach().float().cpu() - began).square().sum())
            norms += float(began.square().sum())
        distance, norm = math.sqrt(moved), math.sqrt(norms)
        self._drift[name] = {"distance": distance, "relative": distance / norm}
        self._work.message(f"{name}: the encoder is {distance:.4g} from the model's, {distance / norm:.2%} of its norm")

    def facts(self) -> dict[str, Any]:
        return {"training": joined(self._results).facts(), "drift": self._drift}
