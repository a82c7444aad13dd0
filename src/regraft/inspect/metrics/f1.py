"""F1 of an image or text classifier: the harmonic mean of precision and recall of a class, averaged over classes.

    F1(c) = 2 TP / (2 TP + FP + FN)
    macro:    the mean over the classes that are in the data or were predicted
    weighted: the mean over the classes of the data, by how many rows they have
    micro:    from the sums of TP, FP and FN over all classes, which is accuracy where each row has one class
    binary:   F1 of the class that `positive` names

Use it where classes are of very different sizes: a model that never predicts a rare class can have a high accuracy.
Columns and labels are those of `accuracy`. All classes' F1, precision and recall are in the notes. The interval
resamples rows. Everything is computed from the table of true and predicted classes, so that resampling costs little;
it agrees with scikit-learn's `f1_score(zero_division=0)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from regraft.errors import UserError, nearest
from regraft.inspect.classification import ClassifierOptions, classifier
from regraft.inspect.inputs import check_labelled
from regraft.inspect.intervals import bootstrap
from regraft.inspect.metric import Score, metric

Ints = NDArray[np.int64]
Average = Literal["macro", "weighted", "micro", "binary"]


class F1Options(ClassifierOptions):
    """Options of f1."""

    average: Average = Field("macro", description="how the classes' values become one")
    positive: str | None = Field(None, description="name of the class that counts, for average: binary")


def _check(data: Path, options: F1Options) -> None:
    if (options.average == "binary") != (options.positive is not None):
        what = "average: binary and positive go together"
        raise UserError("RG303", what, where="f1", fix="give both, or leave both out")
    check_labelled(data, options)


@metric(summary="harmonic mean of precision and recall, over classes", options=F1Options, check=_check)
def f1(model: Path, data: Path, options: F1Options) -> Score:
    """Raises RG601 for data and RG602 for models that cannot be used. Memory: one batch, and two numbers per row."""
    _check(data, options)
    asked = classifier(model, data, options)
    positive = _number(options.positive, asked.names, model)
    rows = list(asked)
    pairs = np.array([(true, guess) for _, true, guess in rows], dtype=np.int64)
    groups = np.array([group for group, _, _ in rows], dtype=object)
    n = max(asked.names) + 1
    per_group = {
        str(name): _score(pairs[groups == name], n, options.average, positive)
        for name in dict.fromkeys(group for group, _, _ in rows if group is not None)
    }
    f, precision, recall = per_class(table(pairs[:, 0], pairs[:, 1], n))
    classes = {
        name: {"f1": float(f[i]), "precision": float(precision[i]), "recall": float(recall[i])}
        for i, name in asked.names.items()
    }
    notes: dict[str, Any] = {**asked.notes, "average": options.average, "classes": classes}
    return _score(pairs, n, options.average, positive).model_copy(update={"per_group": per_group, "notes": notes})


def table(true: Ints, guess: Ints, n: int) -> Ints:
    """How many rows of class i (first axis) were taken for class j, (n, n)."""
    counts: Ints = np.bincount(true * n + guess, minlength=n * n).reshape(n, n)
    return counts


def per_class(counts: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """F1, precision and recall of each class, (n,) each; 0 where nothing was predicted or there is nothing to find."""
    hit, truth, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    return (
        2 * hit / np.maximum(truth + guessed, 1),
        hit / np.maximum(guessed, 1),
        hit / np.maximum(truth, 1),
    )


def f1_of(counts: Ints, average: Average, positive: int = 0) -> float:
    """F1 from a table of true and predicted classes."""
    hit, truth, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    if average == "micro":
        return float(hit.sum() / counts.sum())
    values = per_class(counts)[0]
    if average == "binary":
        return float(values[positive])
    if average == "weighted":
        return float((values * truth).sum() / truth.sum())
    return float(values[truth + guessed > 0].mean())


def _score(pairs: Ints, n: int, average: Average, positive: int) -> Score:
    def of(index: Ints) -> float:
        return f1_of(table(pairs[index, 0], pairs[index, 1], n), average, positive)

    return Score(value=of(np.arange(len(pairs))), n=len(pairs), interval=bootstrap(len(pairs), of))


def _number(name: str | None, names: Any, model: Path) -> int:
    if name is None:
        return 0
    numbers = {label: number for number, label in names.items()}
    if name not in numbers:
        raise UserError("RG602", f"the model has no label {name!r}", where=str(model), fix=nearest(name, numbers))
    return int(numbers[name])
