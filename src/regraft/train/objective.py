"""The contract of an objective, and objectives made of terms that share one pass through the model.

    class Objective:
        def collate(self, examples, seeds) -> batch
        def loss(self, model, batch) -> (loss, metrics)

That is all the loop asks for. `seeds` holds a number per example, a function of the run's seed, the epoch and the
example's number alone: whatever is drawn for an example (a mask, an augmentation) is drawn from it, so that neither the
size of a batch, nor the number of processes, nor an interruption changes what is drawn.

Most objectives are `Sum`s of `Term`s: each term says which signals from inside the model it looks at, the student (and
the teacher, if a term needs one) passes through the batch once, and every term computes its part from what was seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from regraft.errors import UserError
from regraft.train.masked_images import hide_alike
from regraft.train.tap import Seen, Signal, look, unwrapped
from regraft.train.teacher import Teacher

Batch: TypeAlias = "dict[str, Any]"
Collate: TypeAlias = "Callable[[Sequence[Mapping[str, Any]], Sequence[int]], Batch]"


class Objective(ABC):
    """What a run minimises."""

    @abstractmethod
    def collate(self, examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
        """The batch of some examples; whatever is random in it is a function of their seeds."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and further numbers to show."""

    def prepare(self, model: Any) -> None:  # noqa: B027 - most objectives have nothing to prepare
        """Called once before the first step: raises `UserError` for a model that the objective cannot take."""

    @property
    def reads_weights(self) -> bool:
        """Whether weights are computed with outside the model's own pass, which needs them whole."""
        return False

    def at(self, step: int, steps: int) -> None:  # noqa: B027
        """Called before each pass: steps that are done, and steps of the whole run."""


@dataclass(frozen=True)
class Phases:
    """A weight that changes along the run: (share of the steps from which on it holds, weight), the first from 0."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.points]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
            what = f"the phases of a weight begin at {starts}"
            raise UserError("RG303", what, fix="begin at 0, and give increasing shares below 1")

    def at(self, progress: float) -> float:
        return [weight for start, weight in self.points if start <= progress][-1]


class Term(ABC):
    """One part of a loss, computed from what was seen in a pass.

    Attributes:
        name: what the progress display and the logs call it.
        needs_teacher: whether a frozen model has to pass through the batch, too.
        reads_weights: whether it computes with weights outside the model's own pass.
    """

    name: str
    needs_teacher = False
    reads_weights = False

    def signals(self, model: Any) -> Sequence[Signal]:
        """What to look at inside the student."""
        return ()

    def teacher_signals(self, teacher: Any) -> Sequence[Signal]:
        """What to look at inside the teacher."""
        return ()

    def prepare(self, student: Any, teacher: Any | None) -> None:  # noqa: B027
        """Called once before the first step: raises `UserError` for models that do not go together."""

    def at(self, step: int) -> None:  # noqa: B027
        """Called before each pass with the number of steps that are done."""

    @abstractmethod
    def __call__(self, student: Seen, batch: Batch, teacher: Seen | None) -> Tensor:
        """The mean over the batch."""


@dataclass
class Sum(Objective):
    """A weighted sum of terms over batches that `collating` makes.

    Attributes:
        collating: examples and seeds -> batch.
        terms: (weight, term); a term whose weight is 0 is not computed.
        teacher: the frozen model, or its runner, for terms that need one.
    """

    collating: Collate
    terms: Sequence[tuple[float | Phases, Term]]
    teacher: Teacher | None = None
    _progress: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        names = [term.name for _, term in self.terms]
        if len(set(names)) != len(names):
            raise ValueError(f"terms of one name: {names}")
        lacking = [term.name for _, term in self.terms if term.needs_teacher and self.teacher is None]
        if lacking:
            raise UserError("RG304", f"{lacking[0]} needs a teacher", fix="name the model to learn from")

    @property
    def reads_weights(self) -> bool:
        return any(term.reads_weights for _, term in self.terms)

    def collate(self, examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Batch:
        return self.collating(examples, seeds)

    def at(self, step: int, steps: int) -> None:
        self._progress = step / steps
        for _, term in self.terms:
            term.at(step)

    def prepare(self, model: Any) -> None:
        teacher = self.teacher.model if self.teacher is not None else None
        if self.teacher is not None:
            hide_alike(unwrapped(model), teacher)
        for _, term in self.terms:
            term.prepare(unwrapped(model), teacher)
        if self.teacher is not None:
            wanted = [s for _, term in self.terms if term.needs_teacher for s in term.teacher_signals(teacher)]
            self.teacher.signals = tuple(dict.fromkeys(wanted))

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        active = [(weight, term) for weight, term in self._weights() if weight != 0]
        bare = unwrapped(model)
        wanted = tuple(dict.fromkeys(s for _, term in active for s in term.signals(bare)))
        seen = look(model, batch, wanted)
        taught = self.teacher(batch) if self.teacher and any(term.needs_teacher for _, term in active) else None
        total: Tensor | None = None
        metrics = {}
        for weight, term in active:
            value = term(seen, batch, taught)
            metrics[term.name] = value.detach()
            total = weight * value if total is None else total + weight * value
        if total is None:
            raise UserError("RG303", "all weights of the loss are 0", fix="give one term a weight")
        return total, metrics

    def _weights(self) -> list[tuple[float, Term]]:
        progress = self._progress
        return [(w.at(progress) if isinstance(w, Phases) else w, term) for w, term in self.terms]
