"""Learn from another model: its logits, its hidden states, the labels, or a weighted sum of these.

    L = logit_weight L_logit + feature_weight L_feature + task_weight L_own

L_logit compares the distributions of both heads (`kl`, `soft_ce`, `sym_kl`, `js` with a temperature, or `mse` of the
logits), L_feature the hidden states of all blocks or of the last one (`mse` or `cosine`), L_own is the student's loss
on labels. Both models read the same inputs: they need the same tokenizer, and for logits the same vocabulary or classes
of the same names (`id2label`), in whatever order; for features the same width. `mse` takes any head, the other losses
those that choose one of several classes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.errors import UserError
from regraft.objectives.features import Features
from regraft.objectives.logits import Kind, Logits
from regraft.objectives.own_loss import OwnLoss
from regraft.resize.surgery import load
from regraft.train.feature_cache import FeatureCache
from regraft.train.making import Made, Work, maker
from regraft.train.objective import Sum, Term
from regraft.train.packing import check_cache, check_packing
from regraft.train.processes import rank
from regraft.train.start import FitOptions, HeadOptions, fit, keeps_tensors, start
from regraft.train.teacher import CacheOptions, Teacher, TeacherOptions, device_of
from regraft.train.vocabulary import same_tokens


class DistilOptions(FitOptions, HeadOptions, TeacherOptions, CacheOptions):
    """Options of distil."""

    logit_weight: float = Field(1.0, ge=0, description="of the logits")
    logit_loss: Kind = Field("kl", description="how logits are compared")
    temperature: float = Field(1.0, gt=0, description="both logits are divided by it")
    feature_weight: float = Field(0.0, ge=0, description="of the hidden states")
    feature_loss: Literal["mse", "cosine"] = Field("mse", description="how hidden states are compared")
    features: Literal["all", "last"] = Field("all", description="compare all blocks, or the last one of each stack")
    task_weight: float = Field(0.0, ge=0, description="of the student's own loss on labels")


@maker(room="train", summary="learn a teacher's logits and hidden states", options=DistilOptions,
       roles={"teacher": True}, same_tensors=keeps_tensors)  # fmt: skip
def distil(work: Work[DistilOptions]) -> Made:
    """Raises RG204, RG207 and RG201 for models that do not go together, RG309 for labels that are not there."""
    o = work.options
    begun = start(work)
    if o.task_weight and not begun.batches.has_loss:
        raise UserError("RG309", "there are no labels for the student's own loss", fix="set task_weight to 0")
    terms: list[tuple[float, Term]] = [
        (o.logit_weight, Logits(o.logit_loss, o.temperature)),
        (o.feature_weight, Features(o.features, o.feature_loss)),
        (o.task_weight, OwnLoss()),
    ]
    active = [(weight, term) for weight, term in terms if weight]
    if not active:
        raise UserError("RG303", "all weights of the loss are 0", fix="give one a value")
    same_tokens(work.models["model"], work.models["teacher"])
    check_cache(o.packing, o.cache_teacher)
    cache = FeatureCache(work.folder / f"features-{rank()}", work.key) if o.cache_teacher else None
    teacher = Teacher(load(work.models["teacher"]).float(), device=device_of(o), cache=cache)
    if o.packing:
        check_packing(teacher.model, who="the teacher")
    return fit(work, begun, Sum(begun.batches.collate, active, teacher))
