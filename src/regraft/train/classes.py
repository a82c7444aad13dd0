"""Classifiers side by side: frozen models that read the same examples, each in its own way, and name classes alike.

Every model makes its own inputs of an example (its tokenizer, its image processor, its image size), so models of
different families can be asked about the same data; arrays in a column `pixel_values` go into all of them as they are.
What a teacher says is put into the student's order of classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regraft.errors import UserError
from regraft.resize.surgery import load
from regraft.train.batches import Batches, DataOptions
from regraft.train.class_names import class_order, need_one_class_each
from regraft.train.feature_cache import FeatureCache
from regraft.train.objective import Batch, Collate
from regraft.train.teacher import Teacher
from regraft.train.views import own_batches


@dataclass
class Source:
    """A frozen model whose logits are asked for.

    Attributes:
        runner: runs it.
        collate: examples and seeds -> its own batch.
        order: the number that each class of the student has in this model; None where both number them alike.
        shares: whether it reads the student's batch, too, so that none of its own has to be made.
    """

    runner: Teacher
    collate: Collate
    order: Tensor | None = None
    shares: bool = False

    def logits(self, batch: Batch) -> Tensor:
        """Logits in the student's order of classes."""
        found = self.runner(batch).logits
        return found if self.order is None else found.index_select(-1, self.order.to(found.device))


@dataclass(frozen=True)
class Answers:
    """What a model makes of N examples: the class it predicts, and the probabilities of that one and of the true one.

    `of_label` is None where the examples have no labels.
    """

    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    of_label: NDArray[np.float32] | None


def open_source(
    folder: Path,
    student: Any,
    batches: Batches,
    example: Mapping[str, Any],
    columns: DataOptions,
    data: Path,
    cache: FeatureCache | None = None,
) -> Source:
    """A teacher of a classifier, checked against it and tried on an example.

    Args:
        folder: the teacher's.
        batches: those of the student.
        example: the first one of `data`.

    Raises:
        UserError: RG207 and RG309 for classes that differ, RG601 for data that it cannot read, and what `regraft.load`
            raises.
    """
    model = load(folder).float()
    for one in (student, model):
        if "Classification" not in type(one).__name__:
            what = f"a {type(one).__name__} does not choose one of several classes"
            raise UserError("RG309", what, fix="take a classifier of one label per example")
        need_one_class_each(one)
    order = class_order(student.config, model.config)
    own = own_batches(model, folder, batches, example, columns, data)
    source = Source(Teacher(model, cache=cache), (own or batches).collate, order, shares=own is None)
    try_out(source, example, "teacher")
    return source


def try_out(source: Source, example: Mapping[str, Any], who: str) -> None:
    """Ask a model about one example, so that data it cannot read is refused before anything begins.

    Raises:
        UserError: RG601.
    """
    runner = Teacher(source.runner.model)  # without the cache, whose first entry is to be a whole batch
    try:
        runner(source.collate([example], [0])).logits  # noqa: B018
    except (ValueError, RuntimeError, IndexError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"the {who} cannot read the data: {first}"
        fix = "give inputs that both models take; images in a column image are prepared for each model by its own means"
        raise UserError("RG601", what, fix=fix) from None


def answers_of(
    sources: Sequence[Source], examples: Iterable[Mapping[str, Any]], size: int, device: torch.device | str = "cpu"
) -> tuple[NDArray[np.int64] | None, list[Answers]]:
    """Ask models about the same examples.

    Args:
        sources: the first one's batches hold the labels, if the examples have any.
        examples: read once, in groups of `size`; nothing but three numbers per example and model is kept.
        device: where to compute.

    Returns:
        (labels or None, what each model makes of the examples).
    """
    labels: list[NDArray[np.int64]] = []
    parts: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [[] for _ in sources]
    for group in _groups(examples, size):
        truth: Tensor | None = None
        for i, source in enumerate(sources):
            batch = source.collate(group, [0] * len(group))
            if i == 0 and isinstance(found := batch.get("labels"), Tensor):
                truth = found
                labels.append(found.numpy())
            moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            p = source.logits(moved).float().softmax(-1).cpu()
            of_label = p.gather(-1, truth[:, None]).squeeze(-1) if truth is not None else None
            parts[i].append((p.argmax(-1), p.amax(-1), of_label))
    answers = []
    for own in parts:
        known = [part[2] for part in own if part[2] is not None]
        answers.append(
            Answers(
                torch.cat([part[0] for part in own]).numpy(),
                torch.cat([part[1] for part in own]).numpy(),
                torch.cat(known).numpy() if known else None,
            )
        )
    return (np.concatenate(labels) if labels else None), answers


def _groups(examples: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(examples)
    while group := list(itertools.islice(rows, size)):
        yield group
