"""A frozen model that reads texts, and how what it makes of a text becomes one vector of length 1 (`pooling`).

own    the model's embedding in a space shared with images, or the state of the token that ends a text (CLIP)
mean   the mean of the last hidden states over tokens
first  the state of the first token, which BERT calls [CLS]
last   that of the last token
auto   own where the model has a space shared with images or is made for such a space, else what the folder's
       1_Pooling/config.json of sentence-transformers says, else mean
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from regraft.axes.module_map import modules_of
from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.paths import shown
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
from regraft.train.tap import accepted
from regraft.train.vocabulary import has_tokenizer

Pooling: TypeAlias = Literal["auto", "own", "mean", "first", "last"]

FORMAT = 1  # of the vectors, which a change of this code that changes them has to raise
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
