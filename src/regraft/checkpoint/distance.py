"""Does this model come from that base? Measured on a sample of the weights, in a second even for large models.

What separates fine-tunes from strangers is the cosine between their weight matrices, not the size of the difference.
Measured on small vision transformers trained on digits (medians over the matrices of the layers):

    fine-tuned, usual learning rates      cosine 0.93 to 0.99   relative distance 0.1 to 0.4
    fine-tuned, rates 3 to 10 times that  cosine 0.34 to 0.76   relative distance 0.9 to 2.7
    another training from the same start  cosine 0.52 to 0.61   relative distance 0.9
    trained from another start            cosine -0.01 to 0.00  relative distance 1.40 to 1.43
    random weights                        cosine -0.02 to 0.00  relative distance 1.15 to 1.19

Large models move less (relative distances below 0.1). So a median cosine below 0.15 is a stranger; a relative distance
above 0.2 is far for a fine-tune and said to be so, but no proof. Layer norms and biases tell nothing: they start equal
in all models. Embeddings and heads are left out too, since vocabularies and tasks are exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from regraft.axes import Layout, layout
from regraft.checkpoint.dtypes import as_doubles, is_float
from regraft.checkpoint.model import Checkpoint
from regraft.checkpoint.tensor import BLOCK, TensorSource, numel, read_array, stored_dtype

UNRELATED_COSINE = 0.15
FAR_RELATIVE = 0.2
# Fewer elements than this tell nothing about a cosine: its error for strangers is 1 / sqrt(elements).
_FEWEST = 64
_PIECES = 4


@dataclass(frozen=True)
class GroupDistance:
    """Median over the weight matrices of a group ("attention", "ffn", ...): ‖model - base‖ / ‖base‖, and the cosine."""

    relative: float
    cosine: float
    matrices: int


@dataclass(frozen=True)
class Distance:
    """How far a model is from a base.

    Attributes:
        verdict: "identical" (as far as sampled), "fine-tune", "far" (related, but far for a fine-tune), "unrelated",
            or "unknown" (they have no matrices in common).
        relative, cosine: medians over the matrices inside the layers; None if unknown.
        groups: the same per part of the model.
        compared, skipped: matrices compared, and those without a counterpart of the same shape.
    """

    verdict: str
    relative: float | None
    cosine: float | None
    groups: dict[str, GroupDistance]
    compared: int
    skipped: int

    def sentence(self) -> str:
        """The finding in words."""
        if self.relative is None or self.cosine is None:
            return "they have no weight matrices in common"
        figures = f"cosine {self.cosine:.2f}, relative distance {self.relative:.3g}, median of {self.compared} matrices"
        return {
            "identical": f"identical in all {self.compared} matrices sampled",
            "fine-tune": f"as near as a fine-tune ({figures})",
            "far": f"related, but far for a fine-tune ({figures})",
            "unrelated": f"as far as an unrelated model ({figures})",
        }[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def relative_distance(base: Checkpoint, model: Checkpoint, sample: int = BLOCK) -> Distance:
    """Compare the weight matrices of two models.

    Args:
        sample: most elements read per tensor, in up to four evenly spaced pieces; always the same ones.

    Names are matched without the prefix of models with a head, so that a classifier can be compared to a bare base.
    """
    mine, theirs = layout(base.config, base.tensors), layout(model.config, model.tensors)
    others = {theirs.bare(name): source for name, source in model.tensors.items()}
    figures: dict[str, list[tuple[float, float]]] = {}
    skipped = 0
    for name, source in _matrices(base, mine):
        other = others.get(mine.bare(name))
        if other is None or other.shape != source.shape or not is_float(stored_dtype(other)):
            skipped += 1
            continue
        found = _compare(source, other, sample)
        if found is not None:
            figures.setdefault(_group(mine, name), []).append(found)
    groups = {
        group: GroupDistance(median(r for r, _ in pairs), median(c for _, c in pairs), len(pairs))
        for group, pairs in figures.items()
    }
    inner = [pair for group, pairs in figures.items() if group not in ("embedding", "head") for pair in pairs]
    if not inner:
        return Distance("unknown", None, None, groups, 0, skipped)
    relative, cosine = median(r for r, _ in inner), median(c for _, c in inner)
    return Distance(_verdict(figures, relative, cosine), relative, cosine, groups, len(inner), skipped)


def check_base(base: Checkpoint, model: Checkpoint) -> str:
    """Why `model` does not look like a fine-tune of `base`; "" if it does, or if that cannot be told."""
    found = relative_distance(base, model)
    return found.sentence() if found.verdict == "unrelated" else ""


def rank_bases(model: Checkpoint, candidates: Sequence[Checkpoint]) -> list[tuple[Checkpoint, Distance]]:
    """Candidates that the model may come from, nearest first; unrelated ones and those of other shapes are left out.

    Weights do not tell the direction: a model's own fine-tunes are as near as its base.
    """
    found = [(candidate, relative_distance(candidate, model)) for candidate in candidates]
    related = [(c, d) for c, d in found if d.verdict not in ("unrelated", "unknown")]
    return sorted(related, key=lambda pair: pair[1].relative or 0.0)


def _verdict(figures: dict[str, list[tuple[float, float]]], relative: float, cosine: float) -> str:
    if all(r == 0 for pairs in figures.values() for r, _ in pairs):
        return "identical"
    if cosine < UNRELATED_COSINE:
        return "unrelated"
    return "far" if relative > FAR_RELATIVE else "fine-tune"


def _matrices(base: Checkpoint, own: Layout) -> Iterator[tuple[str, TensorSource]]:
    for name, source in base.tensors.items():
        matrix = len(source.shape) >= 2 and is_float(stored_dtype(source)) and numel(source) >= _FEWEST
        if matrix and own.place(name).role != "buffer":
            yield name, source


def _group(own: Layout, name: str) -> str:
    place = own.place(name)
    return place.role or place.part or "other"


def _compare(base: TensorSource, model: TensorSource, sample: int) -> tuple[float, float] | None:
    """(‖model - base‖ / ‖base‖, cosine) of the sampled elements; None if one is all zeros or not finite."""
    a, b = (
        np.concatenate([as_doubles(read_array(one, *span), stored_dtype(one)) for span in _spans(base, sample)])
        for one in (base, model)
    )
    size_a, size_b = _norm(a), _norm(b)
    if not (0 < size_a < math.inf and 0 < size_b < math.inf):
        return None
    return _norm(b - a) / size_a, float(a @ b) / (size_a * size_b)


def _norm(values: np.ndarray) -> float:
    return math.sqrt(values @ values)


def _spans(source: TensorSource, sample: int) -> list[tuple[int, int]]:
    total = numel(source)
    if total <= sample:
        return [(0, total)]
    size = max(1, sample // _PIECES)
    gap = (total - size) / (_PIECES - 1)
    return [(start, start + size) for start in (int(i * gap) for i in range(_PIECES))]
