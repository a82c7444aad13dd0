"""Accuracy of an image or text classifier, over all rows and per group.

A row has a label and one input: `pixel_values` (ready-made arrays, nothing is done to them), `image` (a file beside
the data, or nested lists; the model's own processor prepares it) or `text`. The first of these columns that the data
has is used, unless an option names one. Labels that are names are compared by the model's `id2label`, so models that
number their classes differently are compared rightly; labels that are numbers are taken as the model's own.

The interval is Wilson's, which holds for few rows and for shares near 0 and 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.inspect.classification import ClassifierOptions, classifier
from regraft.inspect.inputs import check_labelled
from regraft.inspect.intervals import wilson
from regraft.inspect.metric import Score, metric


class AccuracyOptions(ClassifierOptions):
    """Options of accuracy."""


@metric(summary="share of rows whose predicted class is the true one", options=AccuracyOptions, check=check_labelled)
def accuracy(model: Path, data: Path, options: AccuracyOptions) -> Score:
    """Raises RG601 for data and RG602 for models that cannot be used. Memory: one batch."""
    asked = classifier(model, data, options)
    right: dict[str | None, int] = {}
    count: dict[str | None, int] = {}
    for group, true, guess in asked:
        right[group] = right.get(group, 0) + int(true == guess)
        count[group] = count.get(group, 0) + 1
    per_group = {g: _share(right[g], count[g]) for g in count if g is not None}
    return _share(sum(right.values()), sum(count.values()), per_group=per_group, notes=asked.notes)


def _share(right: int, n: int, **more: Any) -> Score:
    return Score(value=right / n, n=n, interval=wilson(right, n), **more)
