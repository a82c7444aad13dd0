"""Take over what another trained model knows better, without losing what is known: between any two classifiers.

    target of an example:  the teacher's distribution where the teacher knows better, else that of the student as it was
    L = alpha T^2 KL(target | student) + (1 - alpha) CE(student, label)

Who knows better is decided per example by two frozen models, the teacher and the student as it was at the start, so
nothing pulls the student away from what it had right. With `partition: supervised` the teacher teaches where it gives
the true label the higher probability, with `confidence` where it is surer of its own answer, which needs no labels.
Student and teacher may differ in family, width, depth and image size, and the teacher may be the weaker one; their
classes have to have the same names. Each prepares images and texts by its own means.

The defaults are those of the code published with the paper: plain gradient descent with momentum at 1e-4 for batches of
256 (scale it with the batch), 20 passes, no schedule, T = 1, alpha = 1. What the paper compares with, by options:

| In the paper | Options |
|---|---|
| KL-Dist.+DP, supervised | the defaults |
| KL-Dist.+DP, unsupervised | `partition: confidence` |
| KL-Dist. | `partition: none` |
| XE-KL-Dist. | `partition: none`, `alpha: 0.5` |
| XE-KL-Dist.+MCL | `partition: none`, `alpha: 0.68`, `ema: 0.9999`, `ema_every: 2`, and the next line |
| | `learning_rate: 0.01`, `negative_flips: skip`, `top_k: 100` |
| self-distillation (a control) | `partition: self` |

MCL interpolates weights: what is saved is a slow copy of them, into which every second step enters. Several teachers
teach one after the other (each time, the former self is what the teacher before has made of the student) or at once
(`several: parallel`: on each example the surest of all). The soup of students that learnt from one teacher each, which
the paper has as well, is a `merge: linear` step behind several `transfer` steps.

Before it begins, it is measured on some rows (`measured_rows`) what the teacher knows more, which `regraft flips` shows
without training. With `held_out`, a share of the data is not trained on; there it is measured what was gained and lost,
and a student that got worse is not kept.

Where this departs from that code: its cross-entropy takes probabilities for logits, which is a slip and not done here
unless `double_softmax` asks for it. Weights of norms and biases do not decay. Images are not augmented: the paper's
code crops, flips and recolours them. Causal and masked language models of one tokenizer are an extension: for them, the
above holds for tokens with a label instead of examples. The paper's contrastive baselines (CD, CRD) and partitions by
flips are left out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from regraft.errors import UserError
from regraft.inspect.classification import names_by_number
from regraft.inspect.loading import device_of
from regraft.methods import Paper
from regraft.objectives.transfer import Partition, Transfer
from regraft.resize import surgery
from regraft.train.batches import Batches, DataOptions, batches_for
from regraft.train.classes import Source, open_source, try_out
from regraft.train.data import Part, opened
from regraft.train.feature_cache import FeatureCache
from regraft.train.gains import Measured, evenly_spaced, held_out, measure
from regraft.train.loop import TrainResult, steps_of, train
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.options import TrainOptions
from regraft.train.stages import Progress, joined
from regraft.train.teacher import CacheOptions, Teacher, batch_norms
from regraft.train.vocabulary import same_tokens


class TransferOptions(DataOptions, TrainOptions, CacheOptions):
    """Options of transfer."""

    partition: Partition = Field(
        "supervised", description="where the teacher teaches: where it is surer of the label, or of itself (confidence)"
    )
    alpha: float = Field(1.0, ge=0, le=1, description="share of the divergence; the rest is cross-entropy with labels")
    temperature: float = Field(1.0, gt=0, description="all logits of the divergence are divided by it")
    top_k: int | None = Field(None, ge=2, description="look at the teacher's likeliest classes only; at all if none")
    negative_flips: Literal["teach", "skip"] = Field(
        "teach", description="whether a teacher that is wrong teaches where the student is right; for partition: none"
    )
    double_softmax: bool = Field(False, description="compute the cross-entropy as the published code does")
    several: Literal["sequential", "parallel"] = Field(
        "sequential", description="several teachers teach one after the other, or at once, on each example the surest"
    )
    order: Literal["ascending", "descending", "given"] = Field(
        "ascending", description="of teachers one after the other: by accuracy on the measured rows, or as listed"
    )
    measured_rows: int = Field(
        2000, ge=0, description="on how many rows it is measured beforehand what the teacher knows more; 0 for none"
    )
    held_out: float = Field(
        0.0, ge=0, le=0.9, description="share of the data that is not trained on, but measured before and after"
    )
    freeze_batch_norm: bool = Field(False, description="batch norms keep the statistics that they have")
    optimizer: Literal["adamw", "sgd"] = Field("sgd", description="AdamW, or gradient descent with momentum")
    learning_rate: float = Field(1e-4, gt=0, le=10, description="the highest learning rate; scale it with the batch")
    weight_decay: float = Field(1e-4, ge=0, description="decay of matrices; biases and norms do not decay")
    per_device_train_batch_size: int = Field(256, ge=1, description="examples per pass and device")
    num_train_epochs: float = Field(20.0, gt=0, description="passes over the data, where max_steps is not given")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_cooldown"] = Field(
        "constant", description="how the learning rate falls after the warm-up"
    )
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are scaled down to this norm; 0 leaves them")
    ema_warmup: bool = Field(
        False, description="the first steps count more, so that the mean has no bias to the start; else it begins there"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> TransferOptions:
        if self.negative_flips == "skip" and self.partition != "none":
            raise ValueError("negative_flips: skip is for partition: none; a partition decides by itself")
        if self.double_softmax and self.alpha == 1:
            raise ValueError("double_softmax is of the cross-entropy, whose share is 0 with alpha: 1")
        if self.top_k is not None and self.partition == "self":
            raise ValueError("top_k is of the teacher's classes, and with partition: self no teacher is asked")
        if self.stream and self.held_out:
            raise ValueError("held_out is a share of data with a length, which a stream does not have")
        return self

    @property
    def needs_labels(self) -> bool:
        return self.partition == "supervised" or self.alpha < 1 or self.negative_flips == "skip"


@dataclass
class _Pair:
    """What a transfer works on: the student, as it is and as it was, the teachers by role, and the rows."""

    student: Any
    former: Any
    batches: Batches
    teachers: dict[str, Source]
    rows: Any  # that are trained on
    measured: Part | None  # None where nothing can or need be measured
    dtype: torch.dtype


@maker(
    room="train",
    summary="take over what another classifier knows better, and keep the rest",
    options=TransferOptions,
    roles={"teacher": True},
    several=frozenset({"teacher"}),
    papers=(
        Paper(
            title="Fantastic Gains and Where to Find Them: On the Existence and Prospect of General Knowledge Transfer "
            "between Any Pretrained Model",
            authors="Roth et al.",
            venue="ICLR 2024",
            arxiv="2310.17653",
            number=19,
        ),
    ),
)
def transfer(work: Work[TransferOptions]) -> Made:
    """Raises RG207 and RG204 for models that do not name the same things, RG213 for a teacher that has nothing to
    teach, RG309 for labels that are not there, RG601 for data that one of the models cannot read."""
    o = work.options
    pair = _open(work)
    facts: dict[str, Any] = {"teachers": [{"role": role} for role in pair.teachers]}
    warnings: list[str] = []
    measured: Measured | None = None
    if pair.measured is not None:
        former = Source(Teacher(pair.former), pair.batches.collate)
        size = o.per_device_train_batch_size
        measured = measure(pair.measured, former, pair.teachers, size=size, device=device_of(work.device))
        found, warnings = measured.facts(o.partition, names_by_number(pair.student.config))
        where = "held-out rows" if o.held_out else "rows of the data"
        facts = {"rows": len(pair.measured), "measured_on": where, "teachers": found}
    if o.several == "sequential" and len(pair.teachers) > 1 and o.order != "given":
        accuracy = {fact["role"]: fact["flips"]["teacher"] for fact in facts["teachers"] if "flips" in fact}
        if len(accuracy) < len(pair.teachers):
            what = "there is no accuracy to order the teachers by"
            raise UserError("RG309", what, fix="give labels and measured_rows, or set order to given")
        falling = -1 if o.order == "descending" else 1
        ordered = sorted(pair.teachers, key=lambda role: falling * accuracy[role])
        pair.teachers = {role: pair.teachers[role] for role in ordered}
    result = _learn(work, pair)
    shares = [entry["taught"] for entry in result.history if "taught" in entry]
    if shares and o.partition in ("supervised", "confidence"):
        mean = sum(shares) / len(shares)
        facts["taught"] = mean
        if not 0.01 <= mean <= 0.9:
            warnings.append(f"the teacher taught {mean:.1%} of the examples: too sure of itself, or of no use here")
    facts["order"] = list(pair.teachers)
    student = pair.student
    if o.held_out and measured is not None:
        student = _judged(pair, measured, facts, warnings)
    diagnostics = {"training": result.facts(), "transfer": facts}
    return Made(student.cpu().to(pair.dtype).eval(), diagnostics, warnings)


# -- before ----------------------------------------------------------------------------------------------------------


def _open(work: Work[TransferOptions]) -> _Pair:
    o, folder = work.options, work.models["model"]
    assert work.data is not None
    student = surgery.load(folder)
    dtype = student.dtype
    student.float()
    data = opened(work.data, o)
    example, columns = next(iter(data)), chosen(o, DataOptions)
    batches = batches_for(student, folder, example, columns, data=work.data)
    if batches.kind == "pairs":
        what = f"a {type(student).__name__} has no classes"
        raise UserError("RG309", what, fix="take a classifier, or a masked or causal language model")
    if o.needs_labels and not batches.has_loss:
        what = "there are no labels, which the partition or the cross-entropy needs"
        raise UserError("RG309", what, fix="give a label column, or set partition to confidence and alpha to 1")
    tokens = batches.kind in ("masked", "causal")
    if tokens and o.held_out:
        raise UserError("RG309", "held_out measures classes of examples", fix="leave it out for language models")
    if o.held_out and not batches.has_loss:
        raise UserError("RG309", "held_out measures with labels", fix="give a label column, or leave it out")
    roles = [role for role in work.models if role != "model"]
    if len(roles) > 1 and o.several == "parallel" and (o.partition in ("none", "self") or o.top_k is not None):
        what = "several teachers at once without a choice between them"
        raise UserError("RG309", what, fix="set partition to supervised or confidence, and leave top_k out")
    teachers = {}
    for role in roles:
        cache = FeatureCache(work.folder / "said" / role, f"{work.key} {role}") if o.cache_teacher else None
        if tokens:
            teachers[role] = _of_tokens(work.models[role], folder, student, batches, cache)
        else:
            teachers[role] = open_source(work.models[role], student, batches, example, columns, work.data, cache)
    former = copy.deepcopy(student)
    try_out(Source(Teacher(former), batches.collate), example, "student")
    _check_batch_norm(student, o, None if o.stream else len(data))
    rows: Any = data
    measured: Part | None = None
    if o.held_out:
        rows, measured = held_out(data, o.held_out, o.seed)
    elif o.measured_rows and not o.stream and not tokens:
        measured = evenly_spaced(data, o.measured_rows)
    return _Pair(student, former, batches, teachers, rows, measured, dtype)


def _of_tokens(
    folder: Path, student_folder: Path, student: Any, batches: Batches, cache: FeatureCache | None
) -> Source:
    """A language model as a teacher of another one; both read the same tokens."""
    same_tokens(student_folder, folder)
    model = surgery.load(folder).float()
    own, other = (int(one.config.get_text_config().vocab_size) for one in (student, model))
    if own != other or type(model).__name__.endswith("MaskedLM") != (batches.kind == "masked"):
        kinds = (type(student).__name__, type(model).__name__)
        what = f"the student is a {kinds[0]} of {own} tokens and the teacher a {kinds[1]} of {other}"
        raise UserError("RG204", what, fix="take two of a kind, with one vocabulary")
    return Source(Teacher(model, cache=cache), batches.collate, shares=True)


def _check_batch_norm(student: Any, o: TransferOptions, examples: int | None) -> None:
    if o.freeze_batch_norm or not batch_norms(student):
        return
    size = o.per_device_train_batch_size
    last = examples is not None and not o.drop_last and int(examples * (1 - o.held_out)) % size == 1
    if size == 1 or last:
        what = "a batch norm has nothing to compare a single example with, and a batch of one comes up"
        raise UserError("RG303", what, fix="change per_device_train_batch_size, or set drop_last or freeze_batch_norm")


# -- the transfer ----------------------------------------------------------------------------------------------------


def _learn(work: Work[TransferOptions], pair: _Pair) -> TrainResult:
    """Train the student, by one stage per teacher or in one for all; told as one training."""
    o, options = work.options, chosen(work.options, TrainOptions)
    sources = list(pair.teachers.values())
    stages = [[one] for one in sources] if o.several == "sequential" else [sources]
    steps = steps_of(options, pair.rows)
    progress = Progress(work.tell, len(stages) * steps)
    results = []
    for number, teachers in enumerate(stages):
        folder = work.folder / f"teacher-{number + 1}" if len(stages) > 1 else work.folder
        former = None
        if o.partition != "none":
            kept = work.folder / "said" / f"self-{number}"
            cache = FeatureCache(kept, f"{work.key} {number}") if o.cache_teacher else None
            model = pair.former if number == 0 else copy.deepcopy(pair.student)
            former = Source(Teacher(model, cache=cache), pair.batches.collate, shares=True)
        objective = Transfer(
            pair.batches.collate, former, teachers, partition=o.partition, alpha=o.alpha, temperature=o.temperature,
            top_k=o.top_k, skip_negative_flips=o.negative_flips == "skip", double_softmax=o.double_softmax,
            freeze_batch_norm=o.freeze_batch_norm,
        )  # fmt: skip
        results.append(train(
            pair.student, objective, pair.rows, options, folder=folder,
            key=f"{work.key} {number}", device=work.device, tell=progress.behind(number * steps),
        ))  # fmt: skip
    return joined(results)


# -- after -----------------------------------------------------------------------------------------------------------


def _judged(pair: _Pair, measured: Measured, facts: dict[str, Any], warnings: list[str]) -> Any:
    """The student that is kept: the one that learnt, unless it got worse on the rows that were held out."""
    gains = measured.gains(Source(Teacher(copy.deepcopy(pair.student)), pair.batches.collate))
    for fact in facts["teachers"]:
        fact["transferred"] = gains[fact["role"]].to_dict()
    one = next(iter(gains.values()))
    facts["kept"] = one.after >= one.before
    if facts["kept"]:
        return pair.student
    fell = f"the student fell from {one.before:.2%} to {one.after:.2%} on the {one.n} rows held out"
    warnings.append(f"{fell}, and is left as it was")
    return pair.former
