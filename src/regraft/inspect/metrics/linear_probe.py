"""Accuracy of a linear classifier on a model's frozen embeddings: what its features hold, with little training.

A logistic regression (scikit-learn, L2 penalty 1/C, features standardised on the training rows) is fitted to the rows
of `train_data`, and asked about those of `data`. Without `train_data` the rows of `data` are divided into `folds` parts
of like classes, and each part is asked of a classifier that is fitted to the others, so that every row is asked once.
Rows are embedded by their column `pixel_values`, `image` or `text`. The interval is Wilson's; with folds it leaves out
that the classifiers share rows, and is a little narrow.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from regraft.errors import UserError
from regraft.inspect.embedding import Labelled, NeighbourOptions, check_rows, embedder, labelled, share_right
from regraft.inspect.metric import Score, metric


class LinearProbeOptions(NeighbourOptions):
    """Options of linear_probe."""

    C: float = Field(1.0, gt=0, description="inverse strength of the L2 penalty")
    folds: int = Field(5, ge=2, description="parts of the data, where there is no train_data")
    max_iter: int = Field(1000, ge=1, description="most steps of the solver")
    seed: int = Field(0, ge=0, lt=2**32, description="of the division into folds")


@metric(
    summary="accuracy of a logistic regression on a model's frozen embeddings",
    options=LinearProbeOptions,
    check=check_rows,
    files=("train_data",),
)
def linear_probe(model: Path, data: Path, options: LinearProbeOptions) -> Score:
    """Raises RG601 for data, RG602 for models that cannot be used. Memory: the vectors of all rows."""
    check_rows(data, options)
    embed = embedder(model, options, data)
    asked = labelled(embed, data, options, limit=options.limit)
    if options.train_data is None:
        guesses, slow = _by_folds(asked, options, data)
    else:
        known = labelled(embed, Path(options.train_data), options)
        _need_classes(known, Path(options.train_data))
        fitted, slow = _fitted(known.vectors, known.labels, options)
        guesses = fitted.predict(asked.vectors)
    notes: dict[str, Any] = {"classes": len(set(asked.labels)), "texts_cut": embed.cut}
    if slow:
        notes["remark"] = "the solver stopped at max_iter before it had converged"
    return share_right(guesses, asked, notes)


def _fitted(vectors: Any, labels: Any, options: LinearProbeOptions) -> tuple[Any, bool]:
    """The classifier, and whether it ended before it had converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=options.C, max_iter=options.max_iter))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.fit(np.asarray(vectors, dtype=np.float64), labels)
    return model, any(issubclass(one.category, ConvergenceWarning) for one in told)


def _by_folds(asked: Labelled, options: LinearProbeOptions, data: Path) -> tuple[Any, bool]:
    from sklearn.model_selection import StratifiedKFold

    _need_classes(asked, data)
    rarest, n = min(Counter(asked.labels).items(), key=lambda pair: pair[1])
    if n < options.folds:
        what = f"the class {rarest!r} has {n} row(s), and there are {options.folds} folds"
        raise UserError("RG601", what, where=str(data), fix="give more rows, fewer folds, or rows to train on")
    labels = np.asarray(asked.labels)
    guesses = np.empty_like(labels)
    slow = False
    for fit, ask in StratifiedKFold(options.folds, shuffle=True, random_state=options.seed).split(labels, labels):
        model, stopped = _fitted(asked.vectors[fit], labels[fit], options)
        guesses[ask], slow = model.predict(asked.vectors[ask]), slow or stopped
    return guesses, slow


def _need_classes(rows: Labelled, path: Path) -> None:
    if len(set(rows.labels)) < 2:
        what = f"all rows have the label {rows.labels[0]!r}"
        raise UserError("RG601", what, where=str(path), fix="give rows of two classes or more")
