"""PELA: low-rank layers, then intermediate pre-training next to the frozen original.

1. Factorise: W ~ B A by a truncated SVD, singular values split evenly, r = floor(O I / (ratio (O + I))).
2. Intermediate pre-training of the low-rank model, the original being the teacher:

       L = task_weight L_own + feature_weight L_fd + perturbation_weight L_wp + logit_weight L_logit
       L_own    the model's own loss: masked or next tokens, classes, pairs of images and texts
       L_fd     mean over all blocks of MSE(h_l^student, h_l^teacher), all tokens that are no padding
       L_wp     mean over low-rank layers of (max_ij |(B A - W)_ij| - perturbation_eps)^2
       L_logit  MSE of the logits (0 in all runs of the paper)

3. Fine-tune as usual: `regraft.load` gives the model, and any trainer, or peft, takes it from there.

Left dense: embeddings, norms, heads, poolers, projections between towers, downsampling; that is what the published
code leaves dense. Without labels the model's own loss is left out, and features alone are matched.
`init: whitened` starts from factors that are best on the data, which the paper does not do.

Departures from the published code: the teacher is in eval mode (the ALBEF script leaves its dropout on); one pass of
the student serves all losses, with one draw of its dropout (the DeiT script runs it twice); padding is not matched.
`perturbation_mode: hinge` is the constraint of the paper's text; `target`, the default, is what its code computes.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import Field

from regraft.errors import UserError
from regraft.methods import Paper
from regraft.objectives.features import Features
from regraft.objectives.logits import Logits
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.perturbation import Perturbation
from regraft.resize import cost
from regraft.resize.factorise import LowRankOptions, factorise
from regraft.resize.surgery import load
from regraft.resize.whitening import WhiteningOptions, collated, moments_for
from regraft.train.batches import DataOptions, batches_for
from regraft.train.data import opened
from regraft.train.feature_cache import FeatureCache
from regraft.train.loop import train
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.objective import Sum, Term
from regraft.train.options import TrainOptions
from regraft.train.packing import check_cache
from regraft.train.processes import rank
from regraft.train.teacher import CacheOptions, Teacher, TeacherOptions, device_of


class PelaOptions(LowRankOptions, WhiteningOptions, DataOptions, TrainOptions, TeacherOptions, CacheOptions):
    """Options of PELA; those of training are for the intermediate pre-training."""

    learning_rate: float = Field(1e-4, gt=0, le=10, description="the highest learning rate of AdamW")
    task_weight: float | None = Field(
        None, ge=0, description="of the model's own loss; 1 where model and data have what it needs, else 0"
    )
    feature_weight: float = Field(1.0, ge=0, description="of feature distillation (alpha)")
    perturbation_weight: float = Field(0.0, ge=0, description="of weight perturbation (gamma)")
    perturbation_eps: float = Field(1e-3, ge=0, description="where the largest deviation of a matrix is to be")
    perturbation_mode: Literal["target", "hinge"] = Field(
        "target", description="pull it towards eps, or only down to it"
    )
    perturbation_every: int = Field(1, ge=1, description="steps between two that compute it")
    logit_weight: float = Field(0.0, ge=0, description="of the squared difference of logits (beta)")
    features: Literal["all", "last"] = Field("all", description="match all blocks, or the last one of each stack")


@maker(
    room="compress",
    summary="low-rank layers, then pre-training that matches the original's features",
    options=PelaOptions,
    papers=(
        Paper(
            title="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
            authors="Guo, Wang, Kankanhalli",
            venue="CVPR 2024",
            arxiv="2310.10700",
            number=1,
        ),
    ),
    same_tensors=lambda options: False,
)
def pela(work: Work[PelaOptions]) -> Made:
    """Raises RG309 if a weight asks for a loss that model and data do not have."""
    o = work.options
    assert work.data is not None
    folder = work.models["model"]
    student, original = load(folder), load(folder)
    dtype = student.dtype
    student.float()  # half precision is widened to be trained, and for what it is compared with
    original.float()
    data = opened(work.data, o)
    first = next(iter(data))
    batches = batches_for(student, folder, first, chosen(o, DataOptions), data=work.data)
    task_weight = o.task_weight if o.task_weight is not None else float(batches.has_loss)
    if task_weight and not batches.has_loss:
        what = f"a {type(student).__name__} with this data has no loss of its own"
        raise UserError("RG309", what, fix="set task_weight to 0, or give labels and a model with a head")
    low_rank = chosen(o, LowRankOptions)
    size = o.per_device_train_batch_size
    examples = list(itertools.islice(iter(data), o.calibration_rows if o.init == "whitened" else size))
    seen = collated(batches.collate, examples, size)
    moments = moments_for(student, seen, low_rank) if o.init == "whitened" else None
    made = factorise(student, low_rank, moments=moments)
    work.message(made.in_words())
    check_cache(o.packing, o.cache_teacher)
    cache = FeatureCache(work.folder / f"features-{rank()}", work.key) if o.cache_teacher else None
    terms: list[tuple[float, Term]] = [
        (task_weight, OwnLoss()),
        (o.feature_weight, Features(o.features)),
        (o.perturbation_weight, Perturbation(o.perturbation_eps, o.perturbation_mode, o.perturbation_every)),
        (o.logit_weight, Logits("mse")),
    ]
    active = [(weight, term) for weight, term in terms if weight]
    if not active:
        raise UserError("RG303", "all weights of the loss are 0", fix="give one a value, or use compress: svd")
    teacher = Teacher(original, device=device_of(o), cache=cache)
    result = train(
        student, Sum(batches.collate, active, teacher), data, chosen(o, TrainOptions),
        folder=work.folder, key=work.key, device=work.device, tell=work.tell,
    )  # fmt: skip
    measured = cost.compared(original, student, seen[0])
    diagnostics: dict[str, Any] = {
        **cost.summary(measured),
        "low_rank": made.to_dict(),
        "cost": measured,
        "training": result.facts(),
    }
    return Made(student.cpu().to(dtype).eval(), diagnostics, made.warnings)
