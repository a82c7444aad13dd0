"""What one classifier knows that another does not, from their predictions on the same examples, by prediction flips.

    positive flip: the student is wrong and the teacher right       negative flip: the other way round

The share of positive flips is the teacher's complementary knowledge: a student that chose the better of both answers
would be right in `ceiling` of the examples. It is there between almost any two models, also where the teacher is
weaker. Where it sits is told by the flips of each class, by the entropy of their distribution over classes (low: the
teacher is an expert of few), and by how few classes hold how much of them.

Source: Roth et al., "Fantastic Gains and Where to Find Them", ICLR 2024, arXiv 2310.17653. The code published with it
counts one class too many for each share of flips, which is not done here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import UserError

SHARES = (0.02, 0.05, 0.2, 0.5)  # of the positive flips, for which the classes that hold them are counted

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Flips:
    """How the predictions of a student and of a teacher differ; shares are of all `n` examples, from 0 to 1.

    Attributes:
        student, teacher: accuracies.
        positive, negative: shares of flips.
        ceiling: accuracy of a student that had all that the teacher knows more: student + positive.
        positive_per_class, negative_per_class: label -> number of flips, of the examples with that label.
        positive_entropy, negative_entropy: of these numbers as a distribution, in nats; None without a flip.
        classes_holding: share of the positive flips -> the smallest number of classes that hold it; empty without one.
    """

    n: int
    student: float
    teacher: float
    positive: float
    negative: float
    ceiling: float
    positive_per_class: dict[str, int]
    negative_per_class: dict[str, int]
    positive_entropy: float | None
    negative_entropy: float | None
    classes_holding: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Transferred:
    """What a transfer did to a student, on examples that it was not trained on; shares of all examples.

    Attributes:
        before, after: accuracies; `delta` is their difference, and gain - loss.
        gain: wrong before and right after.
        loss: right before and wrong after.
        transfer_rate: examples gained in classes in which the teacher had positive flips, over these flips; more than
            1 where the student learnt more than the teacher knew, None where there was no flip.
    """

    n: int
    before: float
    after: float
    delta: float
    gain: float
    loss: float
    transfer_rate: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def flips(
    student: Sequence[int] | Numbers,
    teacher: Sequence[int] | Numbers,
    labels: Sequence[int] | Numbers,
    names: Mapping[int, str] | None = None,
) -> Flips:
    """Compare the predicted classes of two models.

    Args:
        student, teacher: the class that each predicts, one per example.
        labels: the true classes.
        names: of the classes; their numbers if not given.

    Raises:
        UserError: RG601 for predictions of different numbers of examples, or of none.
    """
    s, t, y = _alike(student, teacher, labels)
    right_s, right_t = s == y, t == y
    positive, negative = ~right_s & right_t, right_s & ~right_t
    up, down = _per_class(positive, y, names), _per_class(negative, y, names)
    return Flips(
        n=len(y),
        student=float(right_s.mean()),
        teacher=float(right_t.mean()),
        positive=float(positive.mean()),
        negative=float(negative.mean()),
        ceiling=float((right_s | right_t).mean()),
        positive_per_class=up,
        negative_per_class=down,
        positive_entropy=entropy(up.values()),
        negative_entropy=entropy(down.values()),
        classes_holding={f"{share:.0%}": classes_holding(up.values(), share) for share in SHARES if any(up.values())},
    )


def transferred(
    before: Sequence[int] | Numbers,
    after: Sequence[int] | Numbers,
    teacher: Sequence[int] | Numbers,
    labels: Sequence[int] | Numbers,
) -> Transferred:
    """What became of a student: `before` and `after` are its predictions.

    Raises:
        UserError: RG601 as `flips`.
    """
    b, a, y = _alike(before, after, labels)
    _, t, _ = _alike(before, teacher, labels)
    gained, lost = (b != y) & (a == y), (b == y) & (a != y)
    taught = (b != y) & (t == y)
    in_expert_classes = gained & np.isin(y, y[taught])
    rate = float(in_expert_classes.sum() / taught.sum()) if taught.any() else None
    one, two = float((b == y).mean()), float((a == y).mean())
    return Transferred(len(y), one, two, two - one, float(gained.mean()), float(lost.mean()), rate)


def entropy(counts: Any) -> float | None:
    """Entropy in nats of counts as a distribution; None if there is nothing to count."""
    values = np.array([c for c in counts if c > 0], dtype=np.float64)
    if not len(values):
        return None
    p = values / values.sum()
    return float(-(p * np.log(p)).sum()) + 0.0


def classes_holding(counts: Any, share: float) -> int:
    """The smallest number of classes that hold at least this share of all counts; 0 if there is nothing to hold."""
    values = np.sort(np.array(list(counts), dtype=np.int64))[::-1]
    if not values.sum():
        return 0
    return int(np.argmax(values.cumsum() >= math.ceil(share * values.sum() - 1e-9))) + 1


def similarity(counts: Sequence[int] | Numbers, embeddings: NDArray[Any], share: float) -> float | None:
    """How alike the classes are in which a teacher is an expert: high where its knowledge is of one field.

    Args:
        counts: positive flips of each class.
        embeddings: (classes, D), of the classes' names from any text encoder.
        share: of the flips, whose classes are looked at, the fewest that hold it.

    Returns:
        The mean cosine of all pairs of these classes; None for fewer than two.
    """
    found = classes_holding(counts, share)
    if found < 2:
        return None
    top = np.argsort(-np.asarray(counts), kind="stable")[:found]
    units = embeddings[top] / np.linalg.norm(embeddings[top], axis=1, keepdims=True)
    cosines = units @ units.T
    return float(cosines[np.triu_indices(found, 1)].mean())


def _alike(*given: Sequence[int] | Numbers) -> list[Numbers]:
    arrays = [np.asarray(one, dtype=np.int64) for one in given]
    if len({a.shape for a in arrays}) > 1 or arrays[0].ndim != 1 or not len(arrays[0]):
        what = f"predictions and labels are of {', '.join(str(a.shape) for a in arrays)} examples"
        raise UserError("RG601", what, fix="give one class per example, of the same examples")
    return arrays


def _per_class(chosen: NDArray[np.bool_], labels: Numbers, names: Mapping[int, str] | None) -> dict[str, int]:
    known = sorted(names) if names is not None else sorted(set(labels.tolist()))
    return {names[c] if names is not None else str(c): int((chosen & (labels == c)).sum()) for c in known}
