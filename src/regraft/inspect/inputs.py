"""What of a row a model reads: the columns with texts, images or arrays, and which of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from regraft.errors import UserError
from regraft.inspect.metric import MetricOptions
from regraft.inspect.rows import Row, group_of, read_rows
from regraft.methods import Options

INPUTS = ("pixel_values", "image", "text")


class LengthOptions(Options):
    """Of everything that reads texts."""

    max_length: int | None = Field(
        None, ge=1, description="cut texts at this many tokens; by default at what the model takes"
    )


class InputOptions(LengthOptions):
    """The columns that may hold a row's input."""

    text: str = Field("text", description="column with texts")
    image: str = Field("image", description="column with images: file names, nested lists from 0 to 255, or images")
    pixel_values: str = Field("pixel_values", description="column with arrays that go into the model as they are")


class PairOptions(InputOptions):
    """The same for models that may read two texts at once."""

    text_pair: str | None = Field(None, description="column with a second text, for tasks on pairs")


class LabelledOptions(InputOptions, MetricOptions):
    """Of metrics on inputs with labels."""

    label: str = Field("label", description="column with the true class: its name, or its number")


def input_of(row: Row, options: InputOptions) -> str:
    """Which of the options pixel_values, image and text names a row's input: one that was given, else the first column
    that is there.

    Raises:
        UserError: RG601 if the row has none of them.
    """
    named = [kind for kind in INPUTS if kind in options.model_fields_set]
    for kind in named or [kind for kind in INPUTS if getattr(options, kind) in row.values]:
        row.get(getattr(options, kind))
        return kind
    fix = f"name one of the columns {', '.join(row.values)} by the option text, image or pixel_values"
    raise UserError("RG601", "there is no input column (text, image or pixel_values)", where=row.where, fix=fix)


def check_labelled(data: Path, options: LabelledOptions) -> None:
    """Raise what reading inputs and labels would raise at the first row."""
    first = next(read_rows(data, split=options.split, limit=1))
    input_of(first, options)
    first.get(options.label)
    group_of(first, options.group)


def texts_of(rows: Sequence[Row], options: PairOptions) -> list[Any]:
    """The text of each row, or both of its texts, as a tokenizer takes them."""
    if options.text_pair is None:
        return [row.text(options.text) for row in rows]
    return [(row.text(options.text), row.text(options.text_pair)) for row in rows]
