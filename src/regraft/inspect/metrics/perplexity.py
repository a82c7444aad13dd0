"""Perplexity of a causal language model on text: exp of the mean negative log-likelihood per token, in nats.

Texts are joined by the end-of-text token and cut into windows of `length` tokens, so nothing is padded. Every token
but the very first is predicted exactly once; a token sees what stands before it in its own window, which may include
the end of another text. Perplexities are comparable between models of one tokenizer; between tokenizers compare
`bits_per_byte` in the notes. The interval resamples windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional

from regraft.errors import UserError
from regraft.inspect.intervals import bootstrap
from regraft.inspect.loading import Loaded, context_length, load_config, load_model, load_tokenizer, refuse_masked
from regraft.inspect.metric import MetricOptions, Score, metric
from regraft.inspect.rows import Row, group_of, read_rows

_LOGITS = 1 << 27  # entries of one batch of logits: 512 MiB in float32


class PerplexityOptions(MetricOptions):
    text: str = Field("text", description="column with the text")
    length: int | None = Field(None, ge=2, description="tokens per window; by default what the model takes, up to 1024")
    batch_size: int = Field(8, ge=1, description="windows per forward pass; fewer for large vocabularies")


class _Packer:
    """Joins texts and hands out windows of `length + 1` tokens that overlap by one, so each is predicted once."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._buffer: list[int] = []

    def add(self, tokens: list[int]) -> Iterator[list[int]]:
        self._buffer += tokens
        while len(self._buffer) > self._length:
            yield self._buffer[: self._length + 1]
            del self._buffer[: self._length]

    def rest(self) -> list[int]:
        return self._buffer


class _Tally:
    """Sums of one group: nats and tokens per window, texts and bytes."""

    def __init__(self, length: int) -> None:
        self.packer = _Packer(length)
        self.nats: list[float] = []
        self.tokens: list[int] = []
        self.texts = 0
        self.bytes = 0

    def score(self, **more: Any) -> Score:
        return _score([self], **more)


def _check(data: Path, options: PerplexityOptions) -> None:
    first = next(read_rows(data, split=options.split, limit=1))
    first.text(options.text)
    group_of(first, options.group)


@metric(summary="perplexity of a causal language model on text", options=PerplexityOptions, check=_check)
def perplexity(model: Path, data: Path, options: PerplexityOptions) -> Score:
    """Raises RG601 for data, RG602 for models that do not predict the next token. Memory: one batch of logits."""
    _check(data, options)
    _refuse_others(model)
    loaded = load_model(model, "AutoModelForCausalLM", "next-token prediction", device=options.device)
    tokenizer = load_tokenizer(loaded)
    length = options.length or min(1024, context_length(loaded, tokenizer))
    vocabulary = int(loaded.config.get_text_config().vocab_size)
    size = max(1, min(options.batch_size, _LOGITS // (length * vocabulary)))
    tallies: dict[str | None, _Tally] = {}
    waiting: list[tuple[_Tally, list[int]]] = []
    for row in read_rows(data, split=options.split, limit=options.limit):
        tally = tallies.setdefault(group_of(row, options.group), _Tally(length))
        for window in tally.packer.add(_tokens(row, options.text, tokenizer, tally)):
            waiting.append((tally, window))
            if len(waiting) == size:
                _run(loaded, waiting)
                waiting.clear()
    if waiting:
        _run(loaded, waiting)
    for tally in tallies.values():
        if len(tally.packer.rest()) > 1:
            _run(loaded, [(tally, tally.packer.rest())])
    scored = [t for t in tallies.values() if t.tokens]
    if not scored:
        what = "the data has fewer than two tokens"
        raise UserError("RG601", what, where=str(data), fix="give more text")
    groups = {name: _score([t]) for name, t in tallies.items() if name is not None and t.tokens}
    return _score(scored, per_group=groups, length=length)


def _refuse_others(folder: Path) -> None:
    config = load_config(folder)
    if config.is_encoder_decoder:
        what = "an encoder-decoder model has no perplexity of a text alone"
        raise UserError("RG602", what, where=str(folder), fix="evaluate a decoder-only language model")
    refuse_masked(config, folder, "no perplexity, only a pseudo-perplexity that compares with nothing else")


def _tokens(row: Row, column: str, tokenizer: Any, tally: _Tally) -> list[int]:
    text = row.text(column)
    tally.texts += 1
    tally.bytes += len(text.encode())
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return ids


@torch.inference_mode()
def _run(loaded: Loaded, batch: list[tuple[_Tally, list[int]]]) -> None:
    tokens = torch.tensor([window for _, window in batch], device=loaded.device)  # (B, T + 1)
    logits = loaded.logits(input_ids=tokens[:, :-1], use_cache=False)  # (B, T, V)
    for (tally, window), scores, targets in zip(batch, logits, tokens[:, 1:], strict=True):
        nats = functional.cross_entropy(scores.float(), targets, reduction="none").double().sum().item()
        if not math.isfinite(nats):
            what = "the model's outputs are not finite"
            raise UserError("RG602", what, where=str(loaded.folder), fix="check the model with: regraft inspect")
        tally.nats.append(nats)
        tally.tokens.append(len(window) - 1)


def _score(tallies: list[_Tally], *, length: int | None = None, per_group: dict[str, Score] | None = None) -> Score:
    nats = np.array([v for t in tallies for v in t.nats])
    tokens = np.array([v for t in tallies for v in t.tokens])
    mean = float(nats.sum() / tokens.sum())

    def resampled(index: NDArray[np.int64]) -> float:
        return float(np.exp(min(700.0, nats[index].sum() / tokens[index].sum())))

    notes: dict[str, Any] = {
        "nats_per_token": mean,
        "bits_per_byte": float(nats.sum() / math.log(2) / max(1, sum(t.bytes for t in tallies))),
        "texts": sum(t.texts for t in tallies),
        "windows": len(nats),
    }
    if length is not None:
        notes["length"] = length
    return Score(
        value=math.exp(min(700.0, mean)),
        higher_is_better=False,
        n=int(tokens.sum()),
        unit="tokens",
        interval=bootstrap(len(nats), resampled),
        per_group=per_group or {},
        notes=notes,
    )
