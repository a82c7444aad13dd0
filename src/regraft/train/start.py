"""What every method of the verb `train` begins with: the model, the data, and batches that fit both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from regraft.errors import UserError
from regraft.methods import Options
from regraft.resize.surgery import load
from regraft.train.batches import Batches, DataOptions, batches_for
from regraft.train.data import opened
from regraft.train.loop import train
from regraft.train.making import Made, Work, chosen
from regraft.train.objective import Objective
from regraft.train.options import TrainOptions
from regraft.train.student import SizeOptions, student_of


class FitOptions(SizeOptions, DataOptions, TrainOptions):
    """Options that all methods of `train` share."""


class HeadOptions(Options):
    """What stands on top of the model."""

    head: Literal["own", "sequence_classification", "image_classification"] = Field(
        "own", description="train the model as it is, or with a new head that starts at random"
    )
    labels: tuple[str, ...] = Field((), description="names of the classes of a new head, in the order of its outputs")


_HEADS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}


def keeps_tensors(options: FitOptions) -> bool:
    """Whether a method with these options leaves the tensors of its model as they are, by name and shape."""
    return options.init == "weights" and getattr(options, "head", "own") == "own"


@dataclass
class Start:
    """A model, its data, and how the one is fed with the other; weights of half precision are widened to be trained."""

    model: Any
    data: Any
    batches: Batches
    dtype: torch.dtype  # of the model's weights as they are stored


def start(work: Work[Any], *, labels: bool = True) -> Start:
    """Open the model and the data of a method; without `labels` inputs come as they are, unmasked.

    Raises:
        UserError: whatever `regraft.load`, `open_data` and `batches_for` raise.
    """
    o = work.options
    assert work.data is not None
    folder = work.models["model"]
    model = load_with_head(folder, o) if isinstance(o, HeadOptions) else load(folder)
    if isinstance(o, SizeOptions):
        model = student_of(model, chosen(o, SizeOptions), work.options.seed)
    dtype = model.dtype
    model.float()
    data = opened(work.data, o)
    batches = batches_for(model, folder, next(iter(data)), chosen(o, DataOptions), data=work.data, labels=labels)
    return Start(model, data, batches, dtype)


def load_with_head(folder: Path, options: HeadOptions) -> Any:
    """The model of a folder, with another head if one is wanted.

    Raises:
        UserError: RG303 for a head without labels, or labels without a head.
    """
    if options.head == "own":
        if options.labels:
            raise UserError("RG303", "labels are for a new head", fix="give head, or leave labels out")
        return load(folder)
    if len(options.labels) < 2:
        raise UserError("RG303", "a new head needs the names of its classes", fix="give labels: [..., ...]")
    names = dict(enumerate(options.labels))
    return load(folder, _HEADS[options.head], allow_missing=True, labels=names, seed=getattr(options, "seed", 0))


def fit(work: Work[Any], begun: Start, objective: Objective, *, adapter: Any | None = None) -> Made:
    """Run the loop, and tell what it did; with an adapter (a PEFT model of the model) it is what is trained."""
    result = train(
        begun.model if adapter is None else adapter, objective, begun.data, chosen(work.options, TrainOptions),
        folder=work.folder, key=work.key, device=work.device, tell=work.tell,
    )  # fmt: skip
    model = begun.model.cpu()
    return Made(model.to(begun.dtype) if adapter is None else model, {"training": result.facts()})
