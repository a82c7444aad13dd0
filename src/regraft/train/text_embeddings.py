"""What a frozen text encoder makes of texts: unit vectors, computed once and kept on disk under the texts themselves.

    encoder = TextEncoder(Path("org/encoder"))
    embeddings = embed_texts(encoder, texts)         # one pass; a text that the cache knows is not embedded again
    vectors, numbers = embeddings(["a red bird"])    # (1, D), and a number that equal texts share

The cache lies in regraft's cache folder, one part per encoder and options, so other runs find what one has computed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from regraft.checkpoint.paths import cache_folder, shown
from regraft.errors import UserError
from regraft.train.feature_cache import FeatureCache
from regraft.train.text_encoder import TextEncoder

MISSING = -1


@dataclass
class TextEmbeddings:
    """The embeddings of the texts of some data; called with texts, of which those that are missing are None.

    Attributes:
        dimension: of the vectors.
        texts, missing, distinct, cut: how many texts there are, examples without one, different texts, and texts that
            were cut.
        mean_cosine: of two different texts: near 1 the encoder hardly tells them apart.
        centre: taken from every vector, before it is made a unit vector again; None for nothing.
    """

    dimension: int
    texts: int = 0
    missing: int = 0
    distinct: int = 0
    cut: int = 0
    mean_cosine: float = 0.0
    centre: Tensor | None = None
    _cache: FeatureCache | None = field(default=None, repr=False)
    _key: str = field(default="", repr=False)

    def __call__(self, texts: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Unit vectors (n, D), zeros for missing texts; numbers (n,) that equal texts share, `MISSING` for those.

        Raises:
            UserError: RG601 for a text that was not embedded.
        """
        assert self._cache is not None
        vectors = torch.zeros(len(texts), self.dimension)
        numbers = torch.full((len(texts),), MISSING)
        for i, text in enumerate(texts):
            if is_missing(text):
                continue
            key = text_key(self._key, text)
            found = self._cache.read(key)
            if found is None:
                what = f"the text {shown(text, 60)} has no embedding"
                raise UserError("RG601", what, fix="embed the texts of the data that is trained on")
            vectors[i] = found["embedding"]
            numbers[i] = int(key[:16], 16) >> 1
        if self.centre is not None:
            there = numbers != MISSING
            vectors[there] = functional.normalize(vectors[there] - self.centre, dim=-1)
        return vectors, numbers


def embed_texts(
    encoder: TextEncoder, texts: Iterable[Any], *, centre: bool = False, batch: int = 64, folder: Path | None = None
) -> TextEmbeddings:
    """Embed texts that the cache does not hold, in one pass over them.

    Args:
        texts: in any number; None and empty ones are missing.
        centre: take the mean of the different texts' vectors from each.
        batch: texts per pass of the encoder.
        folder: for the cache; regraft's own if None.

    Raises:
        UserError: RG601 for something that is no text, or if all are missing; RG602 as `TextEncoder`; RG405 for a cache
            that cannot be written.
    """
    home = (folder or cache_folder("text-embeddings")) / encoder.key[:16]
    cache = FeatureCache(home, encoder.key)
    made = TextEmbeddings(encoder.dimension, _cache=cache, _key=encoder.key)
    seen: set[bytes] = set()
    total = torch.zeros(encoder.dimension, dtype=torch.float64)
    for some in _in_batches(_checked(texts, made), batch):
        lacking = {key: text for key, text in some if cache.read(key) is None}
        if lacking:
            vectors, was_cut = encoder(list(lacking.values()))
            for key, vector, one in zip(lacking, vectors, was_cut, strict=True):
                cache.write(key, {"embedding": vector, "cut": one})
        for key, _ in some:
            found = cache.read(key)
            assert found is not None
            made.cut += int(found["cut"])
            if (short := bytes.fromhex(key)) not in seen:
                seen.add(short)
                total += found["embedding"].double()
    if not made.texts:
        raise UserError("RG601", "no example has a text", fix="name the column that holds the texts")
    n = made.distinct = len(seen)
    made.mean_cosine = float((total @ total - n) / (n * (n - 1))) if n > 1 else 1.0
    made.centre = (total / n).float() if centre else None
    return made


def is_missing(text: Any) -> bool:
    """Whether an example has no text."""
    return text is None or (isinstance(text, str) and not text.strip())


def text_key(key: str, text: str) -> str:
    """Names a text for one encoder."""
    return hashlib.blake2b(f"{key}\0{text}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _checked(texts: Iterable[Any], made: TextEmbeddings) -> Iterator[tuple[str, str]]:
    """(key, text) of those that are there, counted in `made`."""
    for number, text in enumerate(texts, 1):
        if is_missing(text):
            made.missing += 1
            continue
        if not isinstance(text, str):
            what = f"the description is {type(text).__name__}, not text"
            raise UserError("RG601", what, where=f"row {number} of the data", fix="name the column that holds text")
        made.texts += 1
        yield text_key(made._key, text), text


def _in_batches(pairs: Iterator[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    while some := list(itertools.islice(pairs, size)):
        yield some
