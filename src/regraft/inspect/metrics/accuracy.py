"""Accuracy of an image or text classifier, over all rows and per group.

A row has a label and one input: `pixel_values` (ready-made arrays, nothing is done to them), `image` (a file beside
the data, or nested lists; the model's own processor prepares it) or `text`. The first of these columns that the data
has is used, unless an option names one. Labels that are names are compared by the model's `id2label`, so models that
number their classes differently are compared rightly; labels that are numbers are taken as the model's own.

The interval is Wilson's, which holds for few rows and for shares near 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from regraft.errors import UserError, nearest
from regraft.inspect import images
from regraft.inspect.intervals import wilson
from regraft.inspect.loading import Loaded, context_length, load_model, load_tokenizer, tokenize
from regraft.inspect.metric import MetricOptions, Score, metric
from regraft.inspect.rows import Row, group_of, in_batches, read_rows

INPUTS = ("pixel_values", "image", "text")
Predict = Callable[[list[Row]], Tensor]  # rows -> logits (rows, labels)


class AccuracyOptions(MetricOptions):
    label: str = Field("label", description="column with the true class: its name, or its number")
    text: str = Field("text", description="column with the text to classify")
    text_pair: str | None = Field(None, description="column with a second text, for tasks on pairs")
    image: str = Field("image", description="column with images: file names, nested lists from 0 to 255, or images")
    pixel_values: str = Field("pixel_values", description="column with arrays that go into the model as they are")
    max_length: int | None = Field(None, ge=1, description="cut texts here; by default at what the model takes")


def _check(data: Path, options: AccuracyOptions) -> None:
    first = next(read_rows(data, split=options.split, limit=1))
    _input(first, options)
    first.get(options.label)
    group_of(first, options.group)


@metric(summary="share of rows whose predicted class is the true one", options=AccuracyOptions, check=_check)
def accuracy(model: Path, data: Path, options: AccuracyOptions) -> Score:
    """Raises RG601 for data and RG602 for models that cannot be used. Memory: one batch."""
    _check(data, options)
    kind = _input(next(read_rows(data, split=options.split, limit=1)), options)
    if kind == "text":
        loaded = load_model(model, "AutoModelForSequenceClassification", "text classification", device=options.device)
    else:
        loaded = load_model(model, "AutoModelForImageClassification", "image classification", device=options.device)
    names = _label_names(loaded)
    notes: dict[str, Any] = {}
    predict = _predictor(loaded, kind, data, options, notes)
    right: dict[str | None, int] = {}
    count: dict[str | None, int] = {}
    rows = read_rows(data, split=options.split, limit=options.limit)
    with torch.inference_mode():
        for batch in in_batches(rows, options.batch_size):
            truth = [_label(row, options.label, names) for row in batch]
            logits = predict(batch).float()
            if not torch.isfinite(logits).all():
                what = f"the model's outputs are not finite in the batch from {batch[0].where} on"
                raise UserError("RG602", what, where=str(model), fix="check the model with: regraft inspect")
            for row, true, guess in zip(batch, truth, logits.argmax(-1).tolist(), strict=True):
                group = group_of(row, options.group)
                right[group] = right.get(group, 0) + int(true == guess)
                count[group] = count.get(group, 0) + 1
    per_group = {g: _share(right[g], count[g]) for g in count if g is not None}
    return _share(sum(right.values()), sum(count.values()), per_group=per_group, notes=notes)


def _share(right: int, n: int, **more: Any) -> Score:
    return Score(value=right / n, n=n, interval=wilson(right, n), **more)


def _input(row: Row, options: AccuracyOptions) -> str:
    chosen = [kind for kind in INPUTS if kind in options.model_fields_set]
    for kind in chosen or [kind for kind in INPUTS if getattr(options, kind) in row.values]:
        row.get(getattr(options, kind))
        return kind
    what = "there is no column to classify (pixel_values, image or text)"
    fix = f"name one of the columns {', '.join(row.values)} by the option text, image or pixel_values"
    raise UserError("RG601", what, where=row.where, fix=fix)


def _label_names(loaded: Loaded) -> Mapping[int, str]:
    config = loaded.config
    names = {int(i): str(name) for i, name in config.id2label.items()}
    if len(names) < 2 or config.problem_type in ("regression", "multi_label_classification"):
        what = f"the model's head has {len(names)} output(s) of type {config.problem_type or 'regression'}"
        fix = "accuracy needs a head with one class per row"
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


def _predictor(loaded: Loaded, kind: str, data: Path, options: AccuracyOptions, notes: dict[str, Any]) -> Predict:
    if kind == "text":
        tokenizer = load_tokenizer(loaded)
        length = options.max_length or context_length(loaded, tokenizer)
        notes["texts_cut"] = 0

        def from_text(batch: list[Row]) -> Tensor:
            texts: list[Any] = [row.text(options.text) for row in batch]
            if options.text_pair:
                texts = [(a, row.text(options.text_pair)) for a, row in zip(texts, batch, strict=True)]
            inputs, cut = tokenize(loaded, tokenizer, texts, length)
            notes["texts_cut"] += cut
            return loaded.logits(**inputs)

        return from_text
    if kind == "image":
        processor = images.load_processor(loaded)
        folder = data if data.is_dir() else data.parent

        def from_images(batch: list[Row]) -> Tensor:
            pictures = [images.picture(row, options.image, folder) for row in batch]
            inputs = processor(images=pictures, return_tensors="pt")
            return loaded.logits(pixel_values=inputs["pixel_values"].to(loaded.device, loaded.model.dtype))

        return from_images

    def from_pixels(batch: list[Row]) -> Tensor:
        channels = int(getattr(loaded.config, "num_channels", 3))
        values = [images.pixel_values(row, options.pixel_values, channels) for row in batch]
        for row, value in zip(batch, values, strict=True):
            if value.shape != values[0].shape:
                what = f"the image is {tuple(value.shape)} and others are {tuple(values[0].shape)}"
                raise UserError("RG601", what, where=row.where, fix="give arrays of one shape")
        pixels = torch.stack(values).to(loaded.device, loaded.model.dtype)
        try:
            return loaded.logits(pixel_values=pixels)
        except ValueError as error:
            what = f"the model does not take arrays of this size: {str(error).splitlines()[0]}"
            raise UserError("RG601", what, where=batch[0].where, fix="give arrays of the model's image size") from None

    return from_pixels
