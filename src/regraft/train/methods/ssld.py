"""SSLD: a small classifier learns what a strong one says of any images or texts; nobody reads a label.

1. Choose. Of the rows of `unlabelled`, if it is given, copies are left out, and what is (nearly) in `held_out`; each
   row goes to the class that the teacher finds most likely; of each class the `per_class` rows with the highest
   probability stay. `selection.jsonl` beside the result says which.
2. Train long, on `data` and what was chosen. Both models see the same input, changed in the same way:

       L = (KL(p_T | p_S) + KL(p_S | p_T)) / 2        p = softmax(logits), summed over classes, mean over examples

3. Train short, on `data` alone, with the same loss and a hundredth of the learning rate: this undoes the shift that the
   chosen rows brought (the paper calls it fine-tuning; no label is read here either). All weights learn. Without
   `unlabelled` there is nothing to undo, and this is left out.

The paper calls the loss JS divergence; what its code computes is the symmetric KL above, `loss: sym_kl`. `js` is the
divergence of that name, `soft_ce` what the code's later examples use. The original code multiplied the loss by the
number of classes and the size of the batch; learning rates that were published with it belong to that.

What helps, by the authors' tables: a teacher of the student's kind and not too far above it, very long training, less
weight decay than with labels. `model` may be trained already (then with a learning rate 10 to 100 times lower), or
begin at random: `init: random`. With a new `head` the student gets the teacher's labels; classes are matched by name.

Departures: AdamW instead of SGD with momentum. Crop and flip are off unless asked for (the paper crops to 0.08 and
flips): whether a mirrored image is still of its class, only the user knows. The teacher's batch norms use their running
statistics; with `teacher_batch_norm: batch` those of the batch, which the authors found a little better. Near copies
are found by grey values on a grid or words in common instead of SIFT. The last, optional training of the final layer at
a larger image size is not part of this.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pydantic import Field

from regraft.checkpoint import open_checkpoint
from regraft.errors import UserError
from regraft.inspect.loading import device_of
from regraft.methods import Paper
from regraft.objectives.logits import Logits
from regraft.resize.surgery import load
from regraft.train import processes
from regraft.train.batches import DataOptions
from regraft.train.class_names import class_names, name_classes
from regraft.train.data import Joined, Part, open_data
from regraft.train.feature_cache import FeatureCache
from regraft.train.loop import steps_of
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.objective import Collate, Sum
from regraft.train.options import TrainOptions
from regraft.train.selection import HeldOut, Pool, Selection, select
from regraft.train.stages import DONE, Stages
from regraft.train.start import FitOptions, HeadOptions, Start, keeps_tensors, start
from regraft.train.teacher import CacheOptions, Teacher, batch_norms
from regraft.train.views import AugmentOptions, own_batches, seen_by_both

_SHARE = 12  # the paper trains 360 epochs, then 30
_SLOWER = 100


class SsldOptions(FitOptions, HeadOptions, AugmentOptions, CacheOptions):
    """Options of ssld; those of training are for the long one."""

    learning_rate: float = Field(1e-3, gt=0, le=10, description="the highest learning rate of AdamW")
    weight_decay: float = Field(1e-3, ge=0, description="decay of matrices; biases and norms do not decay")
    loss: Literal["sym_kl", "js", "kl", "soft_ce"] = Field(
        "sym_kl", description="how the two distributions are compared"
    )
    per_class: int = Field(4000, ge=1, description="most rows of `unlabelled` that are chosen for a class")
    duplicate_similarity: float | None = Field(
        None,
        gt=0,
        le=1,
        description="from which on a row counts as held out; 0.8 for texts and 0.99 for images if not given",
    )
    finish_learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="the highest one of the short training; a hundredth of the long one's if not given",
    )
    finish_num_train_epochs: float | None = Field(
        None,
        ge=0,
        description="its passes over `data`, 0 for none; a twelfth of the long one's passes or steps if not given",
    )
    teacher_batch_norm: Literal["running", "batch"] = Field(
        "running", description="which statistics the teacher's batch norms use"
    )


@maker(
    room="train",
    summary="learn a classifier's soft labels, on data that it chose itself",
    options=SsldOptions,
    roles={"teacher": True},
    sources={
        "unlabelled": "a data file or folder that the teacher chooses further rows from",
        "held_out": "a data file or folder whose rows, and near copies of them, must not be trained on",
    },
    same_tensors=keeps_tensors,
    papers=(
        Paper(
            title="Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve "
            "Backbones",
            authors="Cui et al.",
            venue="2021",
            arxiv="2103.05959",
            number=73,
        ),
    ),
)
def ssld(work: Work[SsldOptions]) -> Made:
    """Raises RG204 and RG207 for models with other labels, RG309 for models that are no classifiers, RG303 for options
    that do not go together."""
    o = work.options
    _check(work)
    folder = work.models["teacher"]
    original = load(folder).float()
    _need_classifier(original, "teacher")
    if o.head != "own":
        work = _with_labels(work, original)
    begun = start(work, labels=False)
    _need_classifier(begun.model, "student")
    term = Logits(o.loss)
    term.prepare(begun.model, original)  # now, and not after hours of choosing
    _check_teacher(o, original)
    source = open_checkpoint(str(folder))
    work.message(f"the teacher is {folder.name}: {source.parameters:,} parameters, content {source.digest()[:12]}")
    theirs = own_batches(original, folder, begun.batches, begun.data[0], chosen(o, DataOptions), work.data)
    cache = FeatureCache(work.folder / "features", work.key) if o.cache_teacher else None
    teacher = Teacher(original, cache=cache, batch_statistics=o.teacher_batch_norm == "batch")
    collate = seen_by_both(begun.batches.collate, theirs.collate if theirs else None, chosen(o, AugmentOptions))
    objective = Sum(collate, [(1.0, term)], teacher)
    selection: Selection | None = None
    warnings: list[str] = []
    data: Any = begun.data
    if "unlabelled" in work.sources:
        pool = _pool(work, "unlabelled")
        selection = _chosen(work, begun, original, (theirs or begun.batches).collate, pool)
        if not selection.rows:
            what = f"nothing is left of the {selection.pool} unlabelled rows without copies and held-out ones"
            raise UserError("RG601", what, where=str(pool.path), fix="give other data, or leave unlabelled out")
        data = Joined([Part(begun.data), Part(pool.data, selection.rows, pool.home, o.image)])
        warnings += _remarks(selection)
    else:
        warnings.append("without unlabelled data the student learned from the inputs of data alone")
    long, short = _schedules(o, selected=selection is not None)
    stages = Stages(work, steps_of(long, data) + (steps_of(short, begun.data) if short else 0))
    stages.fit("long", begun.model, objective, data, long)
    if short is not None:
        stages.fit("short", begun.model, objective, begun.data, short)
    diagnostics: dict[str, Any] = {"training": stages.facts()}
    if selection is None:
        return Made(begun.model.cpu().to(begun.dtype), diagnostics, warnings)
    diagnostics["selection"] = selection.summary()
    files = {"selection.jsonl": selection.manifest()}
    return Made(begun.model.cpu().to(begun.dtype), diagnostics, warnings, files)


def _check(work: Work[SsldOptions]) -> None:
    o = work.options
    augmented = chosen(o, AugmentOptions).active
    if o.stream:
        raise UserError(
            "RG303", "data is joined with what is chosen, which a stream cannot be", fix="set stream to false"
        )
    if o.cache_teacher and (augmented or o.teacher_batch_norm == "batch"):
        what = "what the teacher says is another thing each time, so that keeping it is of no use"
        raise UserError("RG303", what, fix="set cache_teacher to false, or leave augmentation and batch statistics out")
    if "held_out" in work.sources and "unlabelled" not in work.sources:
        raise UserError("RG303", "held_out is compared with unlabelled data, and there is none", fix="leave it out")


def _check_teacher(o: SsldOptions, teacher: Any) -> None:
    if o.teacher_batch_norm == "batch" and not batch_norms(teacher):
        raise UserError("RG303", "the teacher has no batch norms", fix="leave teacher_batch_norm out")


def _need_classifier(model: Any, role: str) -> None:
    name = type(model).__name__
    if not name.endswith(("ForSequenceClassification", "ForImageClassification")):
        fix = "give a head" if role == "student" else "fine-tune it on labels first"
        raise UserError("RG309", f"the {role} is a {name}, not a classifier of images or texts", fix=fix)


def _with_labels(work: Work[SsldOptions], teacher: Any) -> Work[SsldOptions]:
    """The work with the teacher's labels for a new head, or those that were given; they name a nameless teacher's."""
    o, names = work.options, class_names(teacher.config)
    if o.labels:
        if names is None and len(o.labels) == teacher.config.num_labels:
            name_classes(teacher, o.labels)
        return work
    if names is None:
        fix = "give labels: [..., ...] in the order of the teacher's outputs"
        raise UserError("RG303", "the teacher's classes have no names that a new head could take", fix=fix)
    return dataclasses.replace(work, options=o.model_copy(update={"labels": tuple(names)}))


def _pool(work: Work[SsldOptions], name: str) -> Pool:
    path = work.sources[name]
    return Pool(open_data(path), path, chosen(work.options, DataOptions))


def _chosen(work: Work[SsldOptions], begun: Start, original: Any, collate: Collate, pool: Pool) -> Selection:
    """The selection, from a former run if that had come so far; of several processes the first one selects."""
    kept = work.folder / f"{DONE}selection.json"
    everyone = processes.team(work.device)
    if everyone.first and Selection.kept(kept, work.key) is None:
        work.folder.mkdir(parents=True, exist_ok=True)
        _select(work, begun, original, collate, pool).save(kept, work.key)
    everyone.meet()
    found = Selection.kept(kept, work.key)
    assert found is not None
    return found


def _select(work: Work[SsldOptions], begun: Start, original: Any, collate: Collate, pool: Pool) -> Selection:
    o = work.options
    held_out = None
    if "held_out" in work.sources:
        held_out = HeldOut(_pool(work, "held_out").contents(), o.duplicate_similarity)
    assert work.data is not None
    seen = Pool(begun.data, work.data, chosen(o, DataOptions))
    teacher = Teacher(original.to(device_of(work.device)))
    work.message(f"choosing among {len(pool.data):,} rows of {pool.path.name}")
    found = select(teacher, collate, pool, o.per_class, seen=seen, held_out=held_out)
    work.message(
        f"{len(found.rows):,} rows chosen, {found.copies:,} copies and {found.held_out:,} held-out rows left out"
    )
    return found


def _remarks(selection: Selection) -> list[str]:
    if not selection.empty:
        return []
    shown = ", ".join(selection.empty[:10]) + (" ..." if len(selection.empty) > 10 else "")
    return [f"the teacher found no unlabelled row for {len(selection.empty)} of its classes: {shown}"]


def _schedules(o: SsldOptions, *, selected: bool) -> tuple[TrainOptions, TrainOptions | None]:
    """Options of the long training and of the short one, if there is one."""
    long = chosen(o, TrainOptions)
    if not selected or o.finish_num_train_epochs == 0:
        return long, None
    rate = o.finish_learning_rate or o.learning_rate / _SLOWER
    changes: dict[str, Any] = {"learning_rate": rate, "max_steps": None}
    if o.finish_num_train_epochs is not None:
        changes["num_train_epochs"] = o.finish_num_train_epochs
    elif o.max_steps is not None:
        changes["max_steps"] = max(1, o.max_steps // _SHARE)
    else:
        changes["num_train_epochs"] = o.num_train_epochs / _SHARE
    return long, long.model_copy(update=changes)
