"""Accuracy of a k-nearest-neighbour classifier on a model's embeddings: how well classes lie apart without training.

Each row is given the class that most of its `k` nearest neighbours have. The neighbours come from the rows of
`train_data`, or, without it, from the other rows of `data` (leave one out). Rows are embedded by their column
`pixel_values`, `image` or `text`; a model needs no head, so encoders before fine-tuning can be compared. scikit-learn's
KNeighborsClassifier does the search. The interval is Wilson's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from regraft.errors import UserError
from regraft.inspect.embedding import NeighbourOptions, check_rows, embedder, labelled, share_right
from regraft.inspect.metric import Score, metric


class KnnOptions(NeighbourOptions):
    """Options of knn."""

    k: int = Field(5, ge=1, description="neighbours that vote")
    metric: Literal["cosine", "euclidean"] = Field("cosine", description="what is near")
    weights: Literal["uniform", "distance"] = Field("uniform", description="votes count alike, or by 1 / distance")


@metric(
    summary="accuracy of nearest neighbours among a model's embeddings",
    options=KnnOptions,
    check=check_rows,
    files=("train_data",),
)
def knn(model: Path, data: Path, options: KnnOptions) -> Score:
    """Raises RG601 for data, RG602 for models that cannot be used. Memory: the vectors of all rows."""
    check_rows(data, options)
    from sklearn.neighbors import KNeighborsClassifier

    embed = embedder(model, options, data)
    asked = labelled(embed, data, options, limit=options.limit)
    known = asked
    if options.train_data is not None:
        known = labelled(embed, Path(options.train_data), options)
    most = len(known.labels) - (options.train_data is None)
    if most < options.k:
        what = f"there are {most} rows with known labels beside the one that is asked for, and k is {options.k}"
        raise UserError("RG601", what, where=options.train_data or str(data), fix="give more rows, or a smaller k")
    search: Any = KNeighborsClassifier(options.k, metric=options.metric, weights=options.weights)
    search.fit(known.vectors, known.labels)
    # Without rows to predict, scikit-learn predicts those that it knows, each without itself.
    guesses = search.predict(asked.vectors if options.train_data is not None else None)
    notes = {"neighbours from": len(known.labels), "classes": len(set(known.labels)), "texts_cut": embed.cut}
    return share_right(guesses, asked, notes)
