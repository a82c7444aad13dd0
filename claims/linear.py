"""What tasks of text must be answered better than by: linear models of n-grams, and n-grams that two texts share.

Each has as many tries as it has settings here, and takes the one that is best on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from claims.tasks import Matching, Passage, Task

WORDS = r"[^\W_]+|[^\w\s]"  # numbers and signs as well, compound names taken apart


def features() -> dict[str, dict[str, Any]]:
    return {
        "words": {"analyzer": "word", "token_pattern": WORDS, "ngram_range": (1, 2), "sublinear_tf": True},
        "characters": {"analyzer": "char", "ngram_range": (1, 4), "sublinear_tf": True},
    }


def classified(task: Task, end: int | None = None) -> float:
    """Test accuracy of logistic regression on n-grams of words or of characters.

    Args:
        end: also try the last so many characters alone, where what is asked for stands at the end.
    """

    def fitted(options: dict[str, Any], strength: float, length: int | None) -> tuple[float, Any]:
        model = make_pipeline(TfidfVectorizer(**options), LogisticRegression(C=strength, max_iter=300))
        model.fit(_texts(task.parts["train"], length), [p.label for p in task.parts["train"]])
        return _accuracy(model, task.parts["validation"], length), model

    lengths = (None,) if end is None else (None, end)
    tries = [(o, strength, length) for o in features().values() for strength in (3, 30) for length in lengths]
    found = [(*fitted(*one), one[2]) for one in tries]
    _, model, length = max(found, key=lambda one: one[0])
    return _accuracy(model, task.parts["test"], length)


def _texts(passages: Sequence[Passage], length: int | None) -> list[str]:
    return [passage.text if length is None else passage.text[-length:] for passage in passages]


def _accuracy(model: Any, passages: Sequence[Passage], length: int | None) -> float:
    return float(model.score(_texts(passages, length), [passage.label for passage in passages]))


def matched(task: Matching) -> float:
    """How often the right one of a group shares most with a text: cosine of weighted n-grams."""

    def similar(options: dict[str, Any], part: str) -> np.ndarray:
        pairs = task.parts["train"]
        model = TfidfVectorizer(**options).fit([text for pair in pairs for text in (pair.left, pair.right)])
        left, right = (
            model.transform([getattr(pair, side) for pair in task.parts[part]]) for side in ("left", "right")
        )
        return (left @ right.T).toarray()

    options = max(features().values(), key=lambda o: found_in_groups(similar(o, "validation"), task.among))
    return found_in_groups(similar(options, "test"), task.among)


def found_in_groups(similar: np.ndarray, among: int) -> float:
    """How often the own partner is the most similar of its group; ties are divided."""
    shares = []
    for start in range(0, len(similar), among):
        group = similar[start : start + among, start : start + among]
        for row, values in enumerate(group):
            best = np.flatnonzero(values == values.max())
            shares.append(1 / len(best) if row in best else 0.0)
    return float(np.mean(shares))
