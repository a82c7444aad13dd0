"""What a frozen text encoder makes of texts: unit vectors, computed once and kept on disk under the texts themselves.

    encoder = TextEncoder(Path("org/encoder"))
    embeddings = embed_texts(encoder, texts)         # one pass; a text that the cache knows is not embedded again
    vectors, numbers = embeddings(["a red bird"])    # (1, D), and a number that equal texts share

A text becomes one vector in one of these ways (`pooling`):

    own    the model's embedding in a space shared with images, or the state of the token that ends a text (CLIP)
    mean   the mean of the last hidden states over tokens
    first  the state of the first token, which BERT calls [CLS]
    last   that of the last token
    auto   own where the model has a space shared with images or is made for such a space, else what the folder's
           1_Pooling/config.json of sentence-transformers says, else mean

The cache lies in regraft's cache folder, one part per encoder and options, so other runs find what one has computed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from regraft.axes.module_map import modules_of
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.paths import cache_folder, shown
from regraft.errors import UserError
from regraft.inspect.loading import (
    Loaded,
    context_length,
    device_of,
    load_tokenizer,
    text_part,
    tokenize,
    unused_missing,
)
from regraft.resize.surgery import opened
from regraft.train.feature_cache import FeatureCache
from regraft.train.tap import accepted
from regraft.train.vocabulary import has_tokenizer

Pooling: TypeAlias = Literal["auto", "own", "mean", "first", "last"]

MISSING = -1
FORMAT = 1
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_STORED: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


class TextEncoder:
    """A frozen model that reads texts.

    Args:
        folder: of a saved model, with its tokenizer.
        pooling: how a text becomes one vector.
        max_length: texts are cut at this many tokens; else at what the model takes.
        by_sentence: embed each sentence by itself, and take the mean of their unit vectors.
        device: "auto" or "cpu".

    Raises:
        UserError: RG309 for a model that reads no texts or cannot pool like this, RG602 for one without tokenizer or
            with weights missing, and what loading raises.
    """

    def __init__(
        self,
        folder: Path,
        pooling: Pooling = "auto",
        *,
        max_length: int | None = None,
        by_sentence: bool = False,
        device: str = "auto",
    ) -> None:
        model, missing = opened(folder)
        model = model.float().eval().requires_grad_(False)
        self._loaded = Loaded(model, model.config, folder, device_of(device), tuple(missing))
        self._encoder = _reader(model)
        if "input_ids" not in accepted(type(self._encoder)):
            what = f"a {model.config.model_type} model reads no texts"
            raise UserError("RG309", what, where=str(folder), fix="name a text encoder as the teacher")
        if not has_tokenizer(folder):
            fix = "save the tokenizer beside the model"
            raise UserError("RG602", "the text encoder's folder has no tokenizer", where=str(folder), fix=fix)
        self._tokenizer = load_tokenizer(text_part(self._loaded))
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            fix = "add a pad_token to its tokenizer_config.json"
            raise UserError("RG602", "the tokenizer has no token to pad with", where=str(folder), fix=fix)
        self._length = max_length or context_length(self._loaded, self._tokenizer)
        self._by_sentence = by_sentence
        model.to(self._loaded.device)
        probe, _ = tokenize(self._loaded, self._tokenizer, ["a"], self._length)
        with torch.no_grad():
            self._own = self._own_embedding(self._run(probe))
        self.pooling = self._resolved(pooling)
        self.dimension = self._dimension(probe)
        facts = [FORMAT, open_checkpoint(str(folder)).digest(), self.pooling, self._length, by_sentence]
        self.key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors (n, D) of texts, and which of these were cut (n,).

        Raises:
            UserError: RG602 for an encoder whose outputs are not finite.
        """
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        with torch.inference_mode():
            inputs, cut = tokenize(self._loaded, self._tokenizer, flat, self._length)
            vectors = functional.normalize(self._vectors(inputs), dim=-1).cpu()
        was_cut = torch.zeros(len(flat), dtype=torch.bool)
        if cut:
            lengths = [len(ids) for ids in self._tokenizer(flat, verbose=False)["input_ids"]]
            was_cut = torch.tensor(lengths) > self._length
        if self._by_sentence:
            counts = [len(parts) for parts in pieces]
            vectors = torch.stack([part.mean(0) for part in vectors.split(counts)])
            vectors = functional.normalize(vectors, dim=-1)
            was_cut = torch.stack([part.any() for part in was_cut.split(counts)])
        if not torch.isfinite(vectors).all():
            text = texts[int((~torch.isfinite(vectors)).any(1).nonzero()[0])]
            what = f"the text encoder's output is not finite for {shown(text, 60)}"
            fix = "check the model with: regraft inspect --stats"
            raise UserError("RG602", what, where=str(self._loaded.folder), fix=fix)
        return vectors, was_cut

    def _pieces(self, text: str) -> list[str]:
        return [piece for piece in _SENTENCE_END.split(text) if piece.strip()] if self._by_sentence else [text]

    def _own_embedding(self, output: Any) -> str:
        """What in an output is the model's own embedding of a text; "" if nothing is."""
        if hasattr(self._loaded.model, "get_text_features"):
            return "features"
        if getattr(output, "text_embeds", None) is not None:
            return "text_embeds"
        # BERT has a pooler, too, but trained for another task; a model that reads from left to right has one for texts.
        return "pooler_output" if _causal(self._encoder) and hasattr(output, "pooler_output") else ""

    def _resolved(self, pooling: Pooling) -> Pooling:
        folder = self._loaded.folder
        if pooling == "own" and not self._own:
            what = f"a {type(self._loaded.model).__name__} has no text embedding of its own"
            raise UserError("RG309", what, where=str(folder), fix="set pooling to mean, first or last")
        if pooling != "auto":
            return pooling
        if self._own:
            return "own"
        stored = folder / "1_Pooling" / "config.json"
        modes = read_json(stored) if stored.is_file() else {}
        chosen: list[Pooling] = [kind for name, kind in _STORED.items() if modes.get(name)]
        if modes and len(chosen) != 1:
            what = "the pooling of this sentence encoder is none that is known here"
            raise UserError("RG309", what, where=str(stored), fix="set pooling to mean, first or last")
        return chosen[0] if chosen else "mean"

    def _run(self, inputs: dict[str, Tensor]) -> Any:
        known = accepted(type(self._encoder))
        return self._encoder(**{name: value for name, value in inputs.items() if name in known})

    def _vectors(self, inputs: dict[str, Tensor]) -> Tensor:
        """Tokens (n, T) -> (n, D), not normalised."""
        mask = inputs["attention_mask"]
        if self.pooling == "own" and self._own == "features":
            found = self._loaded.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=mask)
            embedded: Tensor = found if isinstance(found, Tensor) else found.pooler_output
            return embedded.float()
        output = self._run(inputs)
        if self.pooling == "own":
            embedded = getattr(output, self._own)
            return embedded.float()
        states: Tensor = output.last_hidden_state.float()  # (n, T, D)
        if self.pooling == "first":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        weights = mask.float()[..., None]
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def _dimension(self, inputs: dict[str, Tensor]) -> int:
        """The width of embeddings. Raises RG602 if weights are missing that they depend on."""
        missing = self._loaded.missing
        self._loaded.model.requires_grad_(bool(missing))
        with torch.set_grad_enabled(bool(missing)):
            vectors = self._vectors(inputs)
            whole = unused_missing(self._loaded, vectors) if missing else True
        self._loaded.model.requires_grad_(False)
        if not whole:
            what = f"the text encoder lacks weights ({missing[0]}), which would be random"
            raise UserError("RG602", what, where=str(self._loaded.folder), fix="use a whole model, or another pooling")
        return int(vectors.shape[-1])


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


def _reader(model: Any) -> Any:
    """The part that gives hidden states of texts: without head, without decoder, without the tower for images."""
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    if hasattr(model, "get_text_features"):
        return text_part(Loaded(model, model.config, Path(), torch.device("cpu"))).model
    if hasattr(model, "text_projection"):
        return model  # its output has both: the states and the projected embedding
    return model.base_model


def _causal(model: Any) -> bool:
    """Whether a model is known to read from left to right."""
    try:
        return modules_of(model).causal("")
    except UserError:
        return False
