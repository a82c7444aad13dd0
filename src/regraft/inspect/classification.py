"""Classifiers of texts and images, run over rows: the predicted class of each, beside the true one.

A row has a label and one input: `pixel_values` (ready-made arrays, nothing is done to them), `image` (a file beside
the data, or nested lists; the model's own processor prepares it) or `text`. The first of these columns that the data
has is used, unless an option names one. Labels that are names are compared by the model's `id2label`, so models that
number their classes differently are compared rightly; labels that are numbers are taken as the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.errors import UserError, nearest
from regraft.inspect import images
from regraft.inspect.inputs import LabelledOptions, PairOptions, check_labelled, input_of, texts_of
from regraft.inspect.loading import Loaded, context_length, load_model, load_tokenizer, tokenize
from regraft.inspect.rows import Row, group_of, home_of, in_batches, read_rows

Predict = Callable[[list[Row]], Tensor]  # rows -> logits (rows, labels)


class ClassifierOptions(PairOptions, LabelledOptions):
    """Options of metrics that ask a classifier."""


@dataclass
class Classifier:
    """A model's classes of the rows of some data, made by `classifier`.

    Attributes:
        names: number of a class -> its name.
        notes: facts that belong to a score.
    """

    folder: Path
    data: Path
    options: ClassifierOptions
    names: Mapping[int, str]
    predict: Predict
    notes: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str | None, int, int]]:
        """(group, true class, predicted class) of each row. Raises RG601 for data, RG602 for outputs of no use."""
        o = self.options
        with torch.inference_mode():
            for batch in in_batches(read_rows(self.data, split=o.split, limit=o.limit), o.batch_size):
                truth = [_label(row, o.label, self.names) for row in batch]
                logits = self.predict(batch).float()
                if not torch.isfinite(logits).all():
                    what = f"the model's outputs are not finite in the batch from {batch[0].where} on"
                    raise UserError("RG602", what, where=str(self.folder), fix="check the model with: regraft inspect")
                for row, true, guess in zip(batch, truth, logits.argmax(-1).tolist(), strict=True):
                    yield group_of(row, o.group), true, guess


def classifier(model: Path, data: Path, options: ClassifierOptions) -> Classifier:
    """Open a classifier for some data.

    Raises:
        UserError: RG601 for data and RG602 for models that cannot be used.
    """
    check_labelled(data, options)
    kind = input_of(next(read_rows(data, split=options.split, limit=1)), options)
    if kind == "text":
        loaded = load_model(model, "AutoModelForSequenceClassification", "text classification", device=options.device)
    else:
        loaded = load_model(model, "AutoModelForImageClassification", "image classification", device=options.device)
    notes: dict[str, Any] = {}
    names = label_names(loaded)
    return Classifier(model, data, options, names, _predictor(loaded, kind, data, options, notes), notes)


def names_by_number(config: Any) -> dict[int, str]:
    """Number -> name of a classifier's outputs, in order."""
    return dict(sorted((int(number), str(name)) for number, name in config.id2label.items()))


def label_names(loaded: Loaded) -> Mapping[int, str]:
    """Number -> name of a head that gives one class per row. Raises RG602 for other heads."""
    config = loaded.config
    names = names_by_number(config)
    if len(names) < 2 or config.problem_type in ("regression", "multi_label_classification"):
        what = f"the model's head has {len(names)} output(s) of type {config.problem_type or 'regression'}"
        fix = "take a model whose head gives one class per row"
        raise UserError("RG602", what, where=str(loaded.folder), fix=fix)
    return names


def _label(row: Row, column: str, names: Mapping[int, str]) -> int:
    value = row.get(column)
    if isinstance(value, str):
        for number, name in names.items():
            if name == value:
                return number
        if not value.strip().isdecimal():
            fix = nearest(value, names.values())
            raise UserError("RG601", f"the model has no label {value!r}", where=row.where, fix=fix)
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or value not in names:
        fix = f"use a name, or a number from 0 to {len(names) - 1}"
        raise UserError("RG601", f"the model has no label {value!r}", where=row.where, fix=fix)
    return value


def _predictor(loaded: Loaded, kind: str, data: Path, options: ClassifierOptions, notes: dict[str, Any]) -> Predict:
    if kind == "text":
        tokenizer = load_tokenizer(loaded)
        length = options.max_length or context_length(loaded, tokenizer)
        notes["texts_cut"] = 0

        def from_text(batch: list[Row]) -> Tensor:
            inputs, cut = tokenize(loaded, tokenizer, texts_of(batch, options), length)
            notes["texts_cut"] += cut
            return loaded.logits(**inputs)

        return from_text
    if kind == "image":
        processor = images.load_processor(loaded)
        folder = home_of(data)

        def from_images(batch: list[Row]) -> Tensor:
            pictures = [images.picture(row, options.image, folder) for row in batch]
            inputs = processor(images=pictures, return_tensors="pt")
            return loaded.logits(pixel_values=inputs["pixel_values"].to(loaded.device, loaded.model.dtype))

        return from_images

    def from_pixels(batch: list[Row]) -> Tensor:
        pixels = images.stacked(batch, options.pixel_values, loaded).to(loaded.device, loaded.model.dtype)
        try:
            return loaded.logits(pixel_values=pixels)
        except ValueError as error:
            what = f"the model does not take arrays of this size: {str(error).splitlines()[0]}"
            raise UserError("RG601", what, where=batch[0].where, fix="give arrays of the model's image size") from None

    return from_pixels
