"""Pre-trained Distillation: a small student is pre-trained, then taught by a fine-tuned teacher, then fine-tuned.

1. `pretrain`: the student begins at random (`init: random` with `num_layers`, `hidden_size`) and learns the language
   model's own loss, masked or next tokens, on `corpus`; on `data`, where no corpus is given.
2. `distil`: under a new head with the teacher's labels it learns, on the texts of `data`, which need no labels,

       L = - sum_c p_T(c | x) log p_S(c | x)          mean over texts, temperature 1, no other term

3. `fine_tune`: if `labelled` is given, cross-entropy on its labels; the head is kept.

Every weight learns in every stage, each stage begins a schedule of its own. The teacher may read other tokens than the
student; labels are matched by name. `stages` says which stages there are, and with `init` that is the comparison that
the paper is about:

    FT    stages: [fine_tune]             PD    stages: [pretrain, distil]
    PF    stages: [pretrain, fine_tune]   PD+F  stages: [pretrain, distil, fine_tune]
    D     stages: [distil]                T     init: bottom, or embeddings, instead of pretrain

Advice from the paper: pre-training is better than the lowest layers of a larger model, and these better than its
embeddings alone, above all for shallow students; for the same size, depth is better than width; pre-training helps even
on the texts of `data`, and it keeps a student right where `data` is small or of another domain. How far `data` is from
`labelled` is told in the result's record. Small students want large learning rates.

A student that is pre-trained already is `model` with `init: weights`, and `stages` without pretrain. Where one is to be
used for more than one task, write the stages as three steps of a recipe (`fine_tune` with `init: random`, `distil`,
`fine_tune`): each leaves a model of its own. Departure: what a stage ends with goes on, not the best of its checkpoints
on labelled data.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from regraft.errors import UserError
from regraft.inspect.loading import device_of
from regraft.methods import Paper
from regraft.objectives.logits import Logits
from regraft.objectives.own_loss import OwnLoss
from regraft.resize.surgery import load
from regraft.train.batches import Batches, DataOptions, batches_for
from regraft.train.class_names import class_names, name_classes
from regraft.train.data import open_data, opened
from regraft.train.feature_cache import FeatureCache
from regraft.train.loop import steps_of
from regraft.train.making import Made, Work, chosen, maker
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from regraft.train.selection import HeldOut, Pool, survey
from regraft.train.stages import Stages
from regraft.train.start import FitOptions
from regraft.train.student import SizeOptions, student_of, with_classes
from regraft.train.teacher import CacheOptions, Teacher
from regraft.train.views import own_batches, seen_by_both

STAGES = ("pretrain", "distil", "fine_tune")
_COMPARED = 20_000  # rows whose words are counted


class PretrainedDistillationOptions(FitOptions, CacheOptions):
    """Options of pretrained_distillation; those of training are for all stages, the prefixed ones for one of them."""

    init: Literal["weights", "layers", "bottom", "embeddings", "random"] = Field(
        "random", description="what the student begins with: random weights, or parts of the model"
    )
    learning_rate: float = Field(3e-4, gt=0, le=10, description="the highest learning rate of AdamW")
    labels: tuple[str, ...] = Field((), description="names of the classes, where the teacher has none for its outputs")
    stages: tuple[Literal["pretrain", "distil", "fine_tune"], ...] = Field(
        (), description="which stages there are; if not given, pretrain and distil, and fine_tune with labelled data"
    )
    pretrain_learning_rate: float | None = Field(None, gt=0, le=10, description="the highest one of pre-training")
    pretrain_max_steps: int | None = Field(None, ge=1, description="steps of pre-training")
    pretrain_num_train_epochs: float | None = Field(None, gt=0, description="passes of pre-training over its texts")
    fine_tune_learning_rate: float | None = Field(None, gt=0, le=10, description="the highest one of fine-tuning")
    fine_tune_max_steps: int | None = Field(None, ge=1, description="steps of fine-tuning")
    fine_tune_num_train_epochs: float | None = Field(None, gt=0, description="passes of fine-tuning over its texts")
    temperature: float = Field(1.0, gt=0, description="both logits are divided by it")

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if list(stages) != [name for name in STAGES if name in stages]:
            raise ValueError(f"the stages are {', '.join(STAGES)}, in this order")
        return stages


@maker(
    room="train",
    summary="pre-train a small student, let a fine-tuned teacher teach it, fine-tune it",
    options=PretrainedDistillationOptions,
    roles={"teacher": True},
    sources={
        "corpus": "a data file or folder with texts to pre-train on",
        "labelled": "a data file or folder with labels to fine-tune on",
        "held_out": "a data file or folder of which no row may be in the data",
    },
    same_tensors=lambda options: False,
    papers=(
        Paper(
            title="Well-Read Students Learn Better: On the Importance of Pre-training Compact Models",
            authors="Turc, Chang, Lee, Toutanova",
            venue="2019",
            arxiv="1908.08962",
            number=79,
        ),
    ),
)
def pretrained_distillation(work: Work[PretrainedDistillationOptions]) -> Made:
    """Raises RG204 and RG207 for models with other labels, RG309 for a model that cannot be pre-trained, RG303 for
    options that do not go together, RG601 for data that is missing, or held out."""
    o = work.options
    names: tuple[str, ...] = o.stages or (*STAGES[:2], *(STAGES[2:] if "labelled" in work.sources else ()))
    if "fine_tune" in names and "labelled" not in work.sources:
        raise UserError("RG601", "the stage fine_tune needs labelled data", fix="add labelled: ..., or leave it out")
    assert work.data is not None
    folder, columns = work.models["model"], chosen(o, DataOptions)
    original = load(work.models["teacher"]).float()
    labels = _labels(o, original)
    student = load(folder)
    student = student_of(student, chosen(o, SizeOptions), o.seed)
    dtype = student.dtype
    student.float()

    # Everything is looked at before anything is trained.
    texts = {"data": opened(work.data, o), **{name: open_data(path) for name, path in work.sources.items()}}
    _need_apart(work, texts, columns)
    corpus = texts.get("corpus", texts["data"])
    plain = _plain_batches(student, folder, _first(corpus), columns) if "pretrain" in names else None
    classifier = with_classes(student, labels, o.seed)
    inputs = batches_for(classifier, folder, _first(texts["data"]), columns, labels=False)
    answers = batches_for(classifier, folder, _first(texts["labelled"]), columns) if "fine_tune" in names else None
    if answers is not None and not answers.has_loss:
        raise UserError(
            "RG601", f"labelled has no column {o.label!r}", where=str(work.sources["labelled"]), fix="add it"
        )
    term = Logits("soft_ce", o.temperature)
    term.prepare(classifier, original)

    theirs = own_batches(original, work.models["teacher"], inputs, _first(texts["data"]), columns, work.data)
    said = survey(Teacher(original.to(device_of(work.device))), (theirs or inputs).collate, texts["data"])

    plans = {name: _options(o, name) for name in names}
    data = {"pretrain": corpus, "distil": texts["data"], "fine_tune": texts.get("labelled")}
    stages = Stages(work, sum(steps_of(plan, data[name]) for name, plan in plans.items()))
    if plain is not None:
        stages.fit("pretrain", student, Sum(plain.collate, [(1.0, OwnLoss())]), corpus, plans["pretrain"])
        classifier = with_classes(student, labels, o.seed)
    if "distil" in names:
        collate = seen_by_both(inputs.collate, theirs.collate if theirs else None)
        cache = FeatureCache(work.folder / "features", work.key) if o.cache_teacher else None
        teacher = Teacher(original, cache=cache)
        stages.fit("distil", classifier, Sum(collate, [(1.0, term)], teacher), data["distil"], plans["distil"])
    if answers is not None:
        objective = Sum(answers.collate, [(1.0, OwnLoss())])
        stages.fit("fine_tune", classifier, objective, data["fine_tune"], plans["fine_tune"])
    diagnostics: dict[str, Any] = {"training": stages.facts(), "teacher": said}
    if "labelled" in texts:
        diagnostics["transfer"] = distance(_words(texts["data"], o.text), _words(texts["labelled"], o.text))
    unread = [name for name, stage in (("corpus", "pretrain"), ("labelled", "fine_tune")) if stage not in names]
    warnings = [f"{name} was not trained on: there is no stage for it" for name in unread if name in work.sources]
    if len(found := [name for name, count in said["classes"].items() if count]) == 1:
        warnings.append(f"the teacher takes all of the first {said['rows']} texts of data for {found[0]!r}")
    return Made(classifier.cpu().to(dtype).eval(), diagnostics, warnings)


def _labels(o: PretrainedDistillationOptions, teacher: Any) -> Sequence[str]:
    """The names of the student's classes; a teacher whose classes have none is given them."""
    if not type(teacher).__name__.endswith("ForSequenceClassification"):
        what = f"the teacher is a {type(teacher).__name__}, not a classifier of texts"
        raise UserError("RG309", what, fix="fine-tune it with head: sequence_classification first")
    found = class_names(teacher.config)
    if found is None and len(o.labels) != teacher.config.num_labels:
        fix = f"give labels: [...], {teacher.config.num_labels} of them in the order of its outputs"
        raise UserError("RG303", "the teacher's classes have no names", fix=fix)
    if found is not None and o.labels and set(found) != set(o.labels):
        what = f"labels are {', '.join(o.labels)} and the teacher's {', '.join(found)}"
        raise UserError("RG207", what, fix="leave labels out")
    if found is None:
        name_classes(teacher, o.labels)
    return o.labels or found or ()


def _plain_batches(student: Any, folder: Path, first: Any, columns: DataOptions) -> Batches:
    found = batches_for(student, folder, first, columns)
    if found.kind not in ("masked", "causal"):
        what = f"a {type(student).__name__} has no language model's loss to be pre-trained with"
        raise UserError("RG309", what, fix="take a masked or causal language model, or leave out the stage pretrain")
    return found


def _first(data: Any) -> Any:
    return next(iter(data))


def _need_apart(work: Work[Any], texts: dict[str, Any], columns: DataOptions) -> None:
    """Raise RG601 if a held-out row is in the data that is trained on."""
    if "held_out" not in texts:
        return
    held = HeldOut(Pool(texts["held_out"], work.sources["held_out"], columns).contents(), 1.0)
    for name in ("data", "labelled"):
        path = work.sources.get(name, work.data)
        if name not in texts or path is None:
            continue
        if not isinstance(texts[name], Sized):
            what = "held_out is looked for in all rows of data, which a stream does not have"
            raise UserError("RG303", what, fix="set stream to false, or leave out held_out")
        pool = Pool(texts[name], path, columns)
        for number in range(len(pool.data)):
            if held.has(pool.content(number)):
                fix = "take it out, or leave out held_out"
                raise UserError("RG601", "a held-out row is trained on", where=pool.row(number).where, fix=fix)


def _options(o: PretrainedDistillationOptions, stage: str) -> TrainOptions:
    """The options of one stage: those of all, with what its own prefix says."""
    plain = chosen(o, TrainOptions)
    if stage == "distil":
        return plain
    own = {name: getattr(o, f"{stage}_{name}") for name in ("learning_rate", "max_steps", "num_train_epochs")}
    changes = {name: value for name, value in own.items() if value is not None}
    if own["num_train_epochs"] is not None and own["max_steps"] is None:
        changes["max_steps"] = None
    return plain.model_copy(update=changes)


def distance(transfer: Sequence[str], labelled: Sequence[str]) -> dict[str, float]:
    """How far the words of the transfer texts are from those of the labelled ones.

    Returns:
        unknown_words: the share of words of the transfer texts that no labelled text has.
        divergence: Jensen-Shannon divergence of the frequencies of words, from 0 to 1 (in bits).
    """
    one, other = Counter(transfer), Counter(labelled)
    vocabulary = sorted(one.keys() | other.keys())
    if not one or not other:
        return {"unknown_words": float(bool(one)), "divergence": float(bool(vocabulary))}
    p, q = (np.array([counts[word] for word in vocabulary]) / counts.total() for counts in (one, other))
    mean = (p + q) / 2
    halves = [float((x[x > 0] * np.log2(x[x > 0] / mean[x > 0])).sum()) for x in (p, q)]
    unknown = sum(count for word, count in one.items() if word not in other) / one.total()
    return {"unknown_words": unknown, "divergence": sum(halves) / 2}


def _words(data: Any, column: str) -> list[str]:
    rows = itertools.islice(iter(data), _COMPARED)
    return [word for row in rows for word in re.findall(r"\w+", str(row.get(column, "")).lower())]
