"""What teachers know that a student does not, measured on labelled data without training anything.

`regraft flips` prints it; `train: transfer` measures the same on some rows of its data before it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import Field

from regraft.errors import UserError
from regraft.inspect.classification import names_by_number
from regraft.inspect.flips import Flips, flips
from regraft.inspect.loading import device_of
from regraft.resize.surgery import load
from regraft.train.batches import DataOptions, batches_for
from regraft.train.classes import Answers, Source, answers_of, open_source, try_out
from regraft.train.data import opened
from regraft.train.making import chosen
from regraft.train.teacher import Teacher


class FlipOptions(DataOptions):
    """Which columns the data has, and how it is read."""

    batch_size: int = Field(64, ge=1, description="examples per pass")


@dataclass(frozen=True)
class Complement:
    """What one teacher knows that the student does not.

    Attributes:
        flips: by whose prediction is right.
        surer_of_label: share of examples that it would teach with labels: it gives the true one more probability.
        surer: share that it would teach without: its most probable class has more than the student's.
    """

    flips: Flips
    surer_of_label: float
    surer: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**self.flips.to_dict(), "surer_of_label": self.surer_of_label, "surer": self.surer}


def complement(
    student: Path | str,
    teachers: Mapping[str, Path | str],
    data: Path | str,
    options: FlipOptions | None = None,
    *,
    device: str = "auto",
) -> dict[str, Complement]:
    """Measure what each teacher knows that the student does not.

    Args:
        student: folder of a classifier.
        teachers: name -> folder.
        data: file or folder with labels; read once, row by row.
        options: names of its columns.

    Returns:
        name of the teacher -> what was found.

    Raises:
        UserError: RG207 and RG309 for classes that differ, RG601 for data that cannot be read or has no labels.
    """
    o, path, folder = options or FlipOptions(), Path(data), Path(student)
    model = load(folder).float()
    rows = opened(path, o)
    example, columns = next(iter(rows)), chosen(o, DataOptions)
    batches = batches_for(model, folder, example, columns, data=path)
    sources = [Source(Teacher(model), batches.collate)]
    sources += [open_source(Path(one), model, batches, example, columns, path) for one in teachers.values()]
    if not batches.has_loss:
        what = f"there is no column {o.label!r} with the true classes"
        raise UserError("RG601", what, where=str(path), fix="name it: label=...")
    try_out(sources[0], example, "student")
    labels, (own, *others) = answers_of(sources, rows, o.batch_size, device_of(device))
    assert labels is not None
    classes = names_by_number(model.config)
    return {name: compared(own, one, labels, classes) for name, one in zip(teachers, others, strict=True)}


def compared(own: Answers, other: Answers, labels: NDArray[Any], names: Mapping[int, str]) -> Complement:
    """What a teacher knows that a student does not, from the answers of both to labelled examples."""
    assert own.of_label is not None
    assert other.of_label is not None
    found = flips(own.predicted, other.predicted, labels, names)
    return Complement(found, float((other.of_label > own.of_label).mean()), share_surer(own, other))


def share_surer(own: Answers, other: Answers) -> float:
    """The share of examples of which a teacher's most probable class has more than the student's."""
    return float((other.confidence > own.confidence).mean())
