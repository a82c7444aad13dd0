"""Texts and images as vectors of a model, for metrics that look at what is near what.

A vector is the model's own embedding where it has one for text and images alike (CLIP), else the mean of the last
hidden states over tokens or positions, padding left out, or the state of the first one. Tensors may be missing from a
checkpoint only if vectors do not depend on them, such as a pooler that is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from regraft.errors import UserError
from regraft.inspect import images
from regraft.inspect.inputs import LabelledOptions, LengthOptions, check_labelled, input_of
from regraft.inspect.intervals import wilson
from regraft.inspect.loading import (
    Loaded,
    context_length,
    forward,
    load_model,
    load_tokenizer,
    text_part,
    tokenize,
    unused_missing,
)
from regraft.inspect.metric import MetricOptions, Score
from regraft.inspect.rows import Row, group_of, home_of, in_batches, need, read_rows

Floats = NDArray[np.float32]


class EmbedderOptions(LengthOptions, MetricOptions):
    """How inputs become vectors."""

    pooling: Literal["mean", "first"] = Field("mean", description="mean over tokens or positions, or the first one")


class NeighbourOptions(LabelledOptions, EmbedderOptions):
    """Of metrics that learn classes from labelled vectors."""

    train_data: str | None = Field(
        None,
        description="file or folder of labelled rows to learn from; by default the other rows of the data",
    )


@dataclass
class Embedder:
    """A model that gives vectors; made by `embedder`.

    Attributes:
        home: the folder that images are named relative to.
        cut: how many texts were cut so far.
    """

    loaded: Loaded
    pooling: str = "mean"
    max_length: int | None = None
    home: Path = Path()
    cut: int = field(default=0, init=False)
    _tokenizer: Any = field(default=None, init=False)
    _processor: Any = field(default=None, init=False)
    _checked: bool = field(default=False, init=False)

    def __call__(self, rows: Sequence[Row], kind: str, column: str) -> Tensor:
        """The vectors of a batch of rows, (B, D) in float32 on the CPU.

        Args:
            kind: "text", "image" or "pixel_values".
            column: where the rows have it.

        Raises:
            UserError: RG601 for rows, RG602 for a model that has no such vectors or whose vectors are not finite.
        """
        inputs = self._texts(rows, column) if kind == "text" else self._pixels(rows, kind, column)
        if not self._checked:
            self._check(inputs)
        with torch.inference_mode():
            found = vectors(self.loaded, inputs, self.pooling).float().cpu()
        if not torch.isfinite(found).all():
            fix = "check the model with: regraft inspect --stats"
            raise UserError("RG602", "the model's embeddings are not finite", where=str(self.loaded.folder), fix=fix)
        return found

    def _texts(self, rows: Sequence[Row], column: str) -> dict[str, Tensor]:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(text_part(self.loaded))
        length = self.max_length or context_length(self.loaded, self._tokenizer)
        inputs, over = tokenize(self.loaded, self._tokenizer, [row.text(column) for row in rows], length)
        self.cut += over
        return inputs

    def _pixels(self, rows: Sequence[Row], kind: str, column: str) -> dict[str, Tensor]:
        if kind == "image":
            if self._processor is None:
                self._processor = images.load_processor(self.loaded)
            pictures = [images.picture(row, column, self.home) for row in rows]
            pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        else:
            pixels = images.stacked(rows, column, self.loaded)
        return {"pixel_values": pixels.to(self.loaded.device, self.loaded.model.dtype)}

    def _check(self, inputs: dict[str, Tensor]) -> None:
        """On the first batch: what the checkpoint lacks must have no part in the vectors."""
        self._checked = True
        if not self.loaded.missing:
            return
        first = {name: value[:1] for name, value in inputs.items()}
        with torch.enable_grad():
            whole = unused_missing(self.loaded, vectors(self.loaded, first, self.pooling))
        if not whole:
            what = f"the checkpoint lacks weights of the encoder ({self.loaded.missing[0]}), which would be random"
            raise UserError("RG602", what, where=str(self.loaded.folder), fix="evaluate a whole model")


def embedder(model: Path, options: EmbedderOptions, data: Path, purpose: str = "embedding") -> Embedder:
    """Open a model to embed the rows of some data.

    Raises:
        UserError: RG602 for a model that cannot be used, and what `load_config` raises.
    """
    loaded = load_model(model, "AutoModel", purpose, device=options.device, allow_missing=True)
    return Embedder(loaded, options.pooling, options.max_length, home_of(data))


def vectors(loaded: Loaded, inputs: Any, pooling: str = "mean") -> Tensor:
    """A batch of B inputs -> (B, D).

    Raises:
        UserError: RG602 if the model takes no such inputs.
    """
    model = loaded.model
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        text = "input_ids" in inputs
        method: Callable[..., Any] = model.get_text_features if text else model.get_image_features
        kept = ("input_ids", "attention_mask") if text else ("pixel_values",)
        output = method(**{name: inputs[name] for name in kept if name in inputs})
        pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return pooled
    encoder = model.get_encoder() if getattr(loaded.config, "is_encoder_decoder", False) else model
    states: Tensor = forward(loaded, inputs, encoder).last_hidden_state
    if states.ndim == 4:  # (B, D, H, W) of a convolutional network
        return states.mean((2, 3))
    if pooling == "first":
        return states[:, 0]
    mask = inputs.get("attention_mask")
    weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
    return (states.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)


@dataclass
class Labelled:
    """Rows as vectors with their labels and groups."""

    vectors: Floats
    labels: list[str]
    groups: list[str | None]


def labelled(embed: Embedder, data: Path, options: LabelledOptions, *, limit: int | None = None) -> Labelled:
    """The rows of some data as vectors, with the labels that the column `options.label` has, in words.

    The embedder then reads images relative to this data.

    Raises:
        UserError: RG601 for rows without input or label; what the embedder raises.
    """
    found: list[Floats] = []
    labels: list[str] = []
    groups: list[str | None] = []
    embed.home = home_of(data)
    for batch in in_batches(read_rows(data, split=options.split, limit=limit), options.batch_size):
        kind = input_of(batch[0], options)
        found.append(embed(batch, kind, getattr(options, kind)).numpy())
        labels += [label_of(row, options.label) for row in batch]
        groups += [group_of(row, options.group) for row in batch]
    return Labelled(np.concatenate(found), labels, groups)


def label_of(row: Row, column: str) -> str:
    """A label in words; numbers as whole numbers where they are, so that 1 and 1.0 are one class."""
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def check_rows(data: Path, options: NeighbourOptions) -> None:
    """Raise what `labelled` would raise at the first row of the data or of `train_data`; RG602 without scikit-learn."""
    need("sklearn", "eval", "learning classes from embeddings")
    for path in (data, *([Path(options.train_data)] if options.train_data else [])):
        check_labelled(path, options)


def share_right(guesses: Any, asked: Labelled, notes: dict[str, Any]) -> Score:
    """The share of rows whose label was guessed, in all and per group, with Wilson's intervals."""
    right = (np.asarray(guesses) == np.asarray(asked.labels)).tolist()
    groups: dict[str, list[bool]] = {}
    for one, group in zip(right, asked.groups, strict=True):
        if group is not None:
            groups.setdefault(group, []).append(one)
    per_group = {name: _share(part) for name, part in groups.items()}
    return _share(right, per_group=per_group, notes=notes)


def _share(right: Sequence[bool], **more: Any) -> Score:
    return Score(value=sum(right) / len(right), n=len(right), interval=wilson(sum(right), len(right)), **more)
