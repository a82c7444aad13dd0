"""Retrieval: for each query its own document is to be found among all documents of the data.

    recall@k:  share of queries that have a right document among the k nearest
    mrr:       mean over queries of 1 / rank of the first right document

Each row holds a query and its document: two texts (columns `query` and `document`), or a text and an image (`query` and
`image` or `pixel_values`) for models that embed both into one space, such as CLIP. Rows of one and the same document
count as one document, which is right for the queries of all of them. Nearness is the cosine. A document that is exactly
as near as the right one counts as half before it, so that a model whose vectors are all alike gets no credit. With
`reverse: true` documents ask for queries (image to text). The notes hold recall@1, 5, 10 and k, MRR and the median
rank. The interval resamples queries.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from regraft.errors import UserError
from regraft.inspect.embedding import EmbedderOptions, embedder
from regraft.inspect.intervals import bootstrap
from regraft.inspect.metric import Score, metric
from regraft.inspect.rows import Row, group_of, in_batches, read_rows

_BLOCK = 1024  # queries whose cosines are in memory at a time


class RetrievalOptions(EmbedderOptions):
    """Options of retrieval."""

    query: str = Field("query", description="column with the text that asks")
    document: str = Field("document", description="column with the text that is to be found")
    image: str = Field("image", description="column with the image that is to be found, where there is no document")
    pixel_values: str = Field("pixel_values", description="the same as arrays that go into the model as they are")
    measure: Literal["recall", "mrr"] = Field("recall", description="recall@k, or the mean reciprocal rank")
    k: int = Field(1, ge=1, description="of recall@k")
    reverse: bool = Field(False, description="documents ask, and queries are to be found")


def _check(data: Path, options: RetrievalOptions) -> None:
    first = next(read_rows(data, split=options.split, limit=1))
    first.text(options.query)
    _document(first, options)
    group_of(first, options.group)


@metric(summary="how often a query finds its document, or its image, first", options=RetrievalOptions, check=_check)
def retrieval(model: Path, data: Path, options: RetrievalOptions) -> Score:
    """Raises RG601 for data, RG602 for models that cannot be used. Memory: the vectors, and 1,024 rows of cosines."""
    _check(data, options)
    embed = embedder(model, options, data, "embedding")
    queries: list[Tensor] = []
    documents: list[Tensor] = []
    query_keys: list[str] = []
    document_keys: list[str] = []
    groups: list[str | None] = []
    for batch in in_batches(read_rows(data, split=options.split, limit=options.limit), options.batch_size):
        kind = _document(batch[0], options)
        queries.append(embed(batch, "text", options.query))
        documents.append(embed(batch, kind, getattr(options, "document" if kind == "text" else kind)))
        query_keys += [row.text(options.query) for row in batch]
        document_keys += [_key(row, getattr(options, "document" if kind == "text" else kind)) for row in batch]
        groups += [group_of(row, options.group) for row in batch]
    one, other = torch.cat(queries), torch.cat(documents)
    if one.shape[1] != other.shape[1]:
        what = f"texts have {one.shape[1]} numbers and images {other.shape[1]}: they share no space"
        raise UserError("RG602", what, where=str(model), fix="use a model that embeds both, such as CLIP")
    if options.reverse:
        one, other, query_keys, document_keys = other, one, document_keys, query_keys
    places = ranks(one, other, document_keys)
    if len(set(document_keys)) < 2:
        what = "all rows have the same document"
        raise UserError("RG601", what, where=str(data), fix="give rows of different documents")
    names = np.array(groups, dtype=object)
    per_group = {
        name: _score(places[names == name], options) for name in dict.fromkeys(g for g in groups if g is not None)
    }
    notes: dict[str, Any] = {f"recall@{k}": float((places <= k).mean()) for k in sorted({1, 5, 10, options.k})}
    notes |= {"mrr": float((1 / places).mean()), "median rank": float(np.median(places))}
    notes |= {"documents": len(set(document_keys)), "texts_cut": embed.cut}
    return _score(places, options).model_copy(update={"per_group": per_group, "notes": notes})


def ranks(queries: Tensor, documents: Tensor, keys: list[str]) -> NDArray[np.float64]:
    """The rank of each query's right document among the different ones, from 1; ties count half.

    Args:
        queries, documents: (n, D) each; row i of one belongs to row i of the other.
        keys: the same for rows of one and the same document, whose first row is the one that counts.
    """
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    number = {key: i for i, key in enumerate(first)}
    right = torch.tensor([number[key] for key in keys])
    pool = functional.normalize(documents[list(first.values())].double(), dim=-1)
    unit = functional.normalize(queries.double(), dim=-1)
    found = []
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ pool.T  # (block, documents)
        own = cosines.gather(1, right[start : start + _BLOCK, None])
        # Vectors that are equal may have cosines that differ in the last bits.
        before = (cosines > own + 1e-9).sum(1)
        same = ((cosines - own).abs() <= 1e-9).sum(1) - 1
        found.append(1 + before + same / 2)
    result: NDArray[np.float64] = torch.cat(found).double().numpy()
    return result


def _score(places: NDArray[np.float64], options: RetrievalOptions) -> Score:
    values = 1 / places if options.measure == "mrr" else (places <= options.k).astype(np.float64)
    interval = bootstrap(len(values), lambda index: float(values[index].mean()))
    return Score(value=float(values.mean()), n=len(values), unit="queries", interval=interval)


def _document(row: Row, options: RetrievalOptions) -> str:
    """What a row's document is: "text", "image" or "pixel_values"."""
    columns = {"text": options.document, "image": options.image, "pixel_values": options.pixel_values}
    names = {"document": "text"}
    named = [names.get(n, n) for n in ("document", "image", "pixel_values") if n in options.model_fields_set]
    for kind in named or [kind for kind, column in columns.items() if column in row.values]:
        if kind == "text":
            row.text(columns[kind])
        else:
            row.get(columns[kind])
        return kind
    fix = f"name one of the columns {', '.join(row.values)} by the option document, image or pixel_values"
    raise UserError("RG601", "there is no document (document, image or pixel_values)", where=row.where, fix=fix)


def _key(row: Row, column: str) -> str:
    """Names the content of a document."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    raw = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
