"""Sentence similarity: Spearman's rank correlation between cosine similarities and gold scores of sentence pairs.

A sentence is embedded as the mean of the encoder's last hidden states over its tokens (padding left out), or as the
state of its first token. Rank correlation asks only whether pairs are ordered rightly, so gold scores of any scale do,
also 0 and 1. The interval resamples pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional

from regraft.errors import UserError
from regraft.inspect.embedding import EmbedderOptions, embedder
from regraft.inspect.intervals import bootstrap
from regraft.inspect.metric import Score, metric
from regraft.inspect.rows import Row, group_of, in_batches, read_rows

Floats = NDArray[np.float64]


class SimilarityOptions(EmbedderOptions):
    """Options of similarity."""

    sentence1: str = Field("sentence1", description="column with the first sentence")
    sentence2: str = Field("sentence2", description="column with the second sentence")
    score: str = Field("score", description="column with the gold score: the higher, the more similar")


def _check(data: Path, options: SimilarityOptions) -> None:
    first = next(read_rows(data, split=options.split, limit=1))
    first.text(options.sentence1)
    first.text(options.sentence2)
    _gold(first, options.score)
    group_of(first, options.group)


@metric(
    summary="rank correlation of sentence embeddings' cosines with gold scores", options=SimilarityOptions, check=_check
)
def similarity(model: Path, data: Path, options: SimilarityOptions) -> Score:
    """Raises RG601 for data, RG602 for models that cannot be used. Memory: one batch, and two numbers per pair."""
    _check(data, options)
    embed = embedder(model, options, data, "sentence embedding")
    cosines: list[float] = []
    gold: list[float] = []
    groups: list[str | None] = []
    rows = read_rows(data, split=options.split, limit=options.limit)
    for batch in in_batches(rows, options.batch_size):
        gold += [_gold(row, options.score) for row in batch]
        groups += [group_of(row, options.group) for row in batch]
        sides = [embed(batch, "text", column) for column in (options.sentence1, options.sentence2)]
        cosines += functional.cosine_similarity(sides[0], sides[1]).tolist()
    x, y = np.array(cosines), np.array(gold)
    if len(y) < 2 or (y == y[0]).all():
        what = f"{len(y)} pair(s) with one and the same gold score have no order"
        raise UserError("RG601", what, where=str(data), fix="give pairs with different scores")
    names = np.array(groups, dtype=object)
    per_group = {}
    for name in dict.fromkeys(g for g in groups if g is not None):
        inside = names == name
        if inside.sum() > 1 and (y[inside] != y[inside][0]).any():
            per_group[name] = _correlation(x[inside], y[inside])
    return _correlation(x, y, per_group=per_group, notes={"sentences_cut": embed.cut})


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; NaN if one of them is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def _ranks(x: Floats) -> Floats:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: Floats = last - (counts - 1) / 2
    return mean_rank[inverse]


def _correlation(x: Floats, y: Floats, **more: Any) -> Score:
    value = spearman(x, y)
    if np.isnan(value):  # all cosines are equal: the embeddings tell nothing apart
        more["notes"] = more.get("notes", {}) | {"remark": "all cosines are the same"}
        return Score(value=0.0, n=len(x), unit="pairs", **more)
    interval = bootstrap(len(x), lambda index: spearman(x[index], y[index]))
    return Score(value=value, n=len(x), unit="pairs", interval=interval, **more)


def _gold(row: Row, column: str) -> float:
    value = row.get(column)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise UserError("RG601", f"{column!r} is {value!r}, not a number", where=row.where, fix="mend the row")
    return number
