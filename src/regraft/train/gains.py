"""What a transfer can gain and what it gained: student and teachers on rows that are measured before and after.

The rows are held out, or some of those that are trained on, which tell before the training what a teacher knows more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from regraft.errors import UserError
from regraft.inspect.flips import Transferred, transferred
from regraft.objectives.transfer import Partition
from regraft.train.classes import Answers, Source, answers_of
from regraft.train.complement import compared, share_surer
from regraft.train.data import Part
from regraft.train.order import example_seed, generator


def held_out(data: Sequence[Mapping[str, Any]], share: float, seed: int) -> tuple[Part, Part]:
    """Rows to train on, and a share of all rows, drawn from a seed, that is kept from them.

    Raises:
        UserError: RG601 if nothing is left to train on.
    """
    n = len(data)
    order = torch.randperm(n, generator=generator(example_seed(seed, -3, 0))).tolist()
    out = n - int(n * (1 - share))
    if out == n:
        what = f"{n} rows of which {share:.0%} are held out leave none to train on"
        raise UserError("RG601", what, fix="give more data, or set held_out lower")
    return Part(data, sorted(order[out:])), Part(data, sorted(order[:out]))


def evenly_spaced(data: Sequence[Mapping[str, Any]], count: int) -> Part:
    """At most so many rows, evenly spaced."""
    n, count = len(data), min(len(data), count)
    return Part(data, [i * n // count for i in range(count)])


@dataclass
class Measured:
    """What the student as it was, and its teachers by role, make of some rows.

    Attributes:
        rows: at least one.
        labels: None where the rows have none.
        size: rows per pass.
    """

    rows: Part
    labels: NDArray[Any] | None
    student: Answers
    teachers: dict[str, Answers]
    size: int
    device: torch.device

    def facts(self, partition: Partition, names: Mapping[int, str]) -> tuple[list[dict[str, Any]], list[str]]:
        """What each teacher knows more, and remarks on it.

        Raises:
            UserError: RG213 for a teacher to which the partition would leave none of the rows.
        """
        found, remarks, chooses = [], [], partition in ("supervised", "confidence")
        for role, one in self.teachers.items():
            share = surer = share_surer(self.student, one)
            fact: dict[str, Any] = {"role": role, "surer": surer}
            if self.labels is not None:
                more = compared(self.student, one, self.labels, names)
                fact |= {"flips": more.flips.to_dict(), "surer_of_label": more.surer_of_label}
                if partition == "supervised":
                    share = more.surer_of_label
                if chooses and not more.flips.positive:
                    rows = f"the {more.flips.n} rows measured"
                    remarks.append(f"{role} is right nowhere where the student is wrong, on {rows}")
            if chooses and not share:
                what = f"{role} would teach none of the {len(self.rows)} rows measured"
                fix = "take another teacher; regraft flips tells beforehand; measured_rows: 0 does not look"
                raise UserError("RG213", what, fix=fix)
            found.append(fact)
        return found, remarks

    def gains(self, student: Source) -> dict[str, Transferred]:
        """What became of the student, seen from each teacher; the rows need labels."""
        assert self.labels is not None
        _, (now,) = answers_of([student], _each(self.rows), self.size, self.device)
        before = self.student.predicted
        return {
            role: transferred(before, now.predicted, one.predicted, self.labels) for role, one in self.teachers.items()
        }


def measure(
    rows: Part, student: Source, teachers: Mapping[str, Source], *, size: int, device: torch.device
) -> Measured:
    """Ask student and teachers about some rows."""
    labels, (own, *others) = answers_of([student, *teachers.values()], _each(rows), size, device)
    return Measured(rows, labels, own, dict(zip(teachers, others, strict=True)), size, device)


def _each(rows: Part) -> Any:
    return (rows[i] for i in range(len(rows)))
