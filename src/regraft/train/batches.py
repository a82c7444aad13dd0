"""Batches for what a model is: masked or next tokens, hidden patches, texts for texts, classes, images with texts.

`batches_for` looks at the model's architecture and at the first example, and gives the function that turns examples
into a batch, labels included where the model has a loss of its own and the data has what that needs. Which tokens are
masked is drawn from the seed of each example, see `regraft.train.objective`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from regraft.errors import UserError, nearest
from regraft.inspect import images
from regraft.inspect.classification import names_by_number
from regraft.inspect.inputs import PairOptions, texts_of
from regraft.inspect.loading import Loaded, context_length, load_tokenizer, text_part
from regraft.inspect.rows import Row, home_of
from regraft.train.masked_images import guesses_patches, hiding, is_auto_encoder
from regraft.train.order import generator
from regraft.train.packing import check_packing, packed
from regraft.train.tap import accepted
from regraft.train.vocabulary import has_tokenizer

IGNORED = -100


class DataOptions(PairOptions):
    """Which columns of the data are what, and how texts become tokens."""

    target: str = Field("target", description="column with the text that an encoder-decoder is to write")
    label: str = Field("label", description="column with classes: names, or numbers")
    max_length: int | None = Field(
        None, ge=2, description="cut texts at this many tokens; by default at what the model takes, up to 512"
    )
    packing: bool = Field(
        False, description="join the texts of a pass into one row without padding, for causal language models"
    )
    mask_probability: float = Field(0.15, gt=0, lt=1, description="share of tokens that masked models have to guess")
    mask_ratio: float | None = Field(
        None, gt=0, lt=1,
        description="share of patches that masked image models have to guess; as configured, or 0.6, if not given",
    )  # fmt: skip
    norm_pix_loss: bool | None = Field(
        None,
        description="whether masked auto-encoders guess patches of mean 0 and variance 1; as configured if not given",
    )
    split: str | None = Field(None, description="split to take from a folder that holds several")
    limit: int | None = Field(None, ge=1, description="use only this many rows, from the start")
    stream: bool = Field(False, description="read the data row by row, in its order; needs max_steps")


@dataclass(frozen=True)
class Batches:
    """How examples become batches.

    Attributes:
        collate: examples and seeds -> batch.
        kind: "masked", "causal", "packed", "text to text", "text classes", "masked images", "image classes", "pairs",
            "texts" or "images".
        has_loss: whether the batches hold what the model's own loss needs.
        tokenizer: of models that read texts.
        preparation: names how texts, or images, become inputs: equal for models that read the same ones, "" for others.
    """

    collate: Callable[[Sequence[Mapping[str, Any]], Sequence[int]], dict[str, Any]]
    kind: str
    has_loss: bool
    tokenizer: Any = None
    preparation: Callable[[], str] = lambda: ""  # a digest of all of a tokenizer, so it is taken where it is needed


def batches_for(
    model: Any,
    folder: Path,
    example: Mapping[str, Any],
    options: DataOptions | None = None,
    *,
    data: Path | None = None,
    labels: bool = True,
) -> Batches:
    """The batches that a model takes.

    Args:
        model: what will run on them.
        folder: the model's, with tokenizer and image processor.
        example: the first one, whose columns decide.
        options: names of columns, lengths.
        data: the data's file or folder, which images are named relative to.
        labels: make what the model's own loss needs; without it inputs come as they are, unmasked.

    Raises:
        UserError: RG601 for columns that are missing, RG602 for a tokenizer or processor that is, RG303 for options
            about hidden patches of a model that guesses none, and what `regraft.train.masked_images.hiding` raises.
    """
    o = options or DataOptions()
    loaded = Loaded(model, model.config, folder, torch.device("cpu"))
    home = folder if data is None else home_of(data)
    takes = accepted(type(model))
    sees, reads = "pixel_values" in takes, "input_ids" in takes
    name = type(model).__name__
    causal = "CausalLM" in name or name.endswith("LMHeadModel")
    if o.packing and not (causal and labels):
        what = f"texts are packed for the own loss of causal language models, and this is a {name}"
        raise UserError("RG309", what, fix="set packing to false")
    pixels, how = _pixels(loaded, example, o, home) if sees else (None, lambda: "")
    if pixels is not None and guesses_patches(model) and (labels or is_auto_encoder(model)):
        return Batches(hiding(model, pixels, o.mask_ratio, o.norm_pix_loss), "masked images", labels)
    if labels and (o.mask_ratio is not None or o.norm_pix_loss is not None):
        given = "mask_ratio" if o.mask_ratio is not None else "norm_pix_loss"
        raise UserError("RG303", f"a {name} guesses no patches of images", fix=f"leave out {given}")
    if sees and reads:
        return Batches(_pairs(_Texts(loaded, o), pixels, labels), "pairs", labels and "return_loss" in takes)
    if sees:
        has_loss = labels and "labels" in takes and _has(example, o.label) and _is_classifier(model)
        kind = "image classes" if has_loss else "images"
        return Batches(_images(model, pixels, o if has_loss else None), kind, has_loss, preparation=how)
    if not reads:
        what = f"a {model.config.model_type} model takes neither texts nor images"
        raise UserError("RG309", what, fix="write an objective whose collate makes its batches")
    texts = _Texts(loaded, o)
    _row(example).text(o.text)
    if "decoder_input_ids" in takes and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        has_loss = labels and _has(example, o.target)
        column = o.target if _has(example, o.target) else o.text
        return Batches(_text_to_text(model, texts, column, has_loss), "text to text", has_loss)
    if labels and "MaskedLM" in name:
        return Batches(_masked(texts, o.mask_probability), "masked", True, texts.tokenizer)
    if labels and o.packing:
        check_packing(model)
        return Batches(_packed(texts), "packed", True, texts.tokenizer)
    if labels and causal:
        return Batches(_causal(texts), "causal", True, texts.tokenizer)
    has_loss = labels and "SequenceClassification" in name and _has(example, o.label)
    kind = "text classes" if has_loss else "texts"
    collate = _classes(model, texts, o if has_loss else None)
    return Batches(collate, kind, has_loss, texts.tokenizer, texts.preparation)


class _Texts:
    """Texts of examples as padded batches of tokens."""

    def __init__(self, loaded: Loaded, options: DataOptions) -> None:
        if not has_tokenizer(loaded.folder):
            fix = "save the tokenizer beside the model"
            raise UserError("RG602", "the model's folder has no tokenizer", where=str(loaded.folder), fix=fix)
        self.tokenizer = load_tokenizer(text_part(loaded))
        self.tokenizer.padding_side = "right"
        self._options = options
        self._length = options.max_length or min(context_length(loaded, self.tokenizer), 512)
        if self.tokenizer.pad_token is None:
            what = "the tokenizer has no token to pad with"
            raise UserError("RG602", what, where=str(loaded.folder), fix="add a pad_token to its tokenizer_config.json")

    def preparation(self) -> str:
        """Names how texts become tokens; see `Batches`."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        made_by = json.loads(backend.to_str()) if backend is not None else self.tokenizer.get_vocab()
        if backend is not None:
            made_by = {**made_by, "truncation": None, "padding": None}  # which are set in each call
        return _digest([made_by, self.tokenizer.model_input_names, self._length])

    def tokens(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The tokens of each text, without padding."""
        texts = [_row(example).text(self._options.text) for example in examples]
        found: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self._length)["input_ids"]
        return found

    def targets(self, examples: Sequence[Mapping[str, Any]], column: str) -> dict[str, Tensor]:
        """The texts of a column as a decoder is to write them."""
        texts = [_row(example).text(column) for example in examples]
        encoded = self.tokenizer(
            text_target=texts, truncation=True, max_length=self._length, padding=True, return_tensors="pt"
        )
        return dict(encoded)

    def __call__(self, examples: Sequence[Mapping[str, Any]], *, special: bool = False) -> dict[str, Tensor]:
        rows = [_row(example) for example in examples]
        encoded = self.tokenizer(
            texts_of(rows, self._options), truncation=True, max_length=self._length, padding=True, return_tensors="pt",
            return_special_tokens_mask=special,
        )  # fmt: skip
        return dict(encoded)


def masked_tokens(
    ids: Tensor, open_to: Tensor, probability: float, mask: int, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """BERT's masking of one text: of the tokens that are chosen 80 % become the mask, 10 % any token, 10 % stay.

    Args:
        ids: (T,).
        open_to: (T,), true where a token may be chosen; at least one of these is, so that no text is for nothing.
        probability: of each token.
        mask, size: the mask's id, and how many ids there are.
        seed: what is drawn is a function of it.

    Returns:
        (ids with masks, labels with -100 where nothing is to be guessed).
    """
    source = generator(seed)
    draws = torch.rand(3, len(ids), generator=source)
    others = torch.randint(size, (len(ids),), generator=source)
    chosen = (draws[0] < probability) & open_to
    if bool(open_to.any()) and not bool(chosen.any()):
        chosen[draws[0].masked_fill(~open_to, 2.0).argmin()] = True
    labels = ids.masked_fill(~chosen, IGNORED)
    result = torch.where(chosen & (draws[1] < 0.8), torch.full_like(ids, mask), ids)
    return torch.where(chosen & (draws[1] >= 0.9), others.to(ids.dtype), result), labels


def _masked(texts: _Texts, probability: float) -> Callable[..., dict[str, Any]]:
    tokenizer = texts.tokenizer
    if tokenizer.mask_token_id is None:
        raise UserError("RG602", "the tokenizer has no mask token", fix="use the tokenizer of a masked language model")

    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        batch = texts(examples, special=True)
        open_to = ~batch.pop("special_tokens_mask").bool()
        lengths = batch["attention_mask"].sum(1).tolist()
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for i, (length, seed) in enumerate(
            zip(lengths, seeds, strict=True)
        ):  # without padding, which depends on others
            ids, labels = masked_tokens(
                batch["input_ids"][i, :length], open_to[i, :length], probability, tokenizer.mask_token_id,
                len(tokenizer), seed,
            )  # fmt: skip
            batch["input_ids"][i, :length], batch["labels"][i, :length] = ids, labels
        return batch

    return collate


def _causal(texts: _Texts) -> Callable[..., dict[str, Any]]:
    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        batch = texts(examples)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        return {**batch, "labels": labels}

    return collate


def _packed(texts: _Texts) -> Callable[..., dict[str, Any]]:
    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        return packed(texts.tokens(examples))

    return collate


def _text_to_text(model: Any, texts: _Texts, column: str, with_loss: bool) -> Callable[..., dict[str, Any]]:
    """What the decoder reads is given beside the labels, since a teacher is not shown these."""

    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        targets = texts.targets(examples, column)
        mask = targets["attention_mask"]
        labels = targets["input_ids"].masked_fill(mask == 0, IGNORED)
        read = model.prepare_decoder_input_ids_from_labels(labels=labels)
        batch = {**texts(examples), "decoder_input_ids": read, "decoder_attention_mask": mask}
        return {**batch, "labels": labels} if with_loss else batch

    return collate


def _classes(model: Any, texts: _Texts, labelled: DataOptions | None) -> Callable[..., dict[str, Any]]:
    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(texts(examples))
        if labelled is not None:
            batch["labels"] = _labels(model, examples, labelled.label)
        return batch

    return collate


def _images(model: Any, pixels: Any, labelled: DataOptions | None) -> Callable[..., dict[str, Any]]:
    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {"pixel_values": pixels(examples)}
        if labelled is not None:
            batch["labels"] = _labels(model, examples, labelled.label)
        return batch

    return collate


def _pairs(texts: _Texts, pixels: Any, with_loss: bool) -> Callable[..., dict[str, Any]]:
    def collate(examples: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
        batch = {**texts(examples), "pixel_values": pixels(examples)}
        return {**batch, "return_loss": True} if with_loss else batch

    return collate


def _pixels(
    loaded: Loaded, example: Mapping[str, Any], o: DataOptions, home: Path
) -> tuple[Callable[..., Tensor], Callable[[], str]]:
    """A function from examples to pixels (B, C, H, W), and how it prepares them; see `Batches`."""
    if _has(example, o.pixel_values):
        config = getattr(loaded.config, "vision_config", loaded.config)
        channels = int(getattr(config, "num_channels", 3))

        def arrays(examples: Sequence[Mapping[str, Any]]) -> Tensor:
            return torch.stack([images.pixel_values(_row(e), o.pixel_values, channels) for e in examples])

        return arrays, lambda: _digest(["arrays", channels])
    _row(example).get(o.image)
    processor = images.load_processor(loaded)

    def pictures(examples: Sequence[Mapping[str, Any]]) -> Tensor:
        prepared = processor(images=[images.picture(_row(e), o.image, home) for e in examples], return_tensors="pt")
        values: Tensor = prepared["pixel_values"]
        return values

    return pictures, lambda: _digest(processor.to_dict())


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _labels(model: Any, examples: Sequence[Mapping[str, Any]], column: str) -> Tensor:
    config = model.config
    if config.problem_type == "regression" or config.num_labels == 1:
        return torch.tensor([float(_row(e).get(column)) for e in examples])
    return torch.tensor([_class(_row(e), column, config) for e in examples])


def _class(row: Row, column: str, config: Any) -> int:
    value = row.get(column)
    if isinstance(value, str):
        known = {name: number for number, name in names_by_number(config).items()}
        if value not in known:
            fix = nearest(value, known)
            raise UserError("RG601", f"the model has no label {value!r}", where=row.where, fix=fix)
        return known[value]
    if not isinstance(value, (int, float)) or int(value) != value or not 0 <= value < config.num_labels:
        fix = f"use a name, or a number from 0 to {config.num_labels - 1}"
        raise UserError("RG601", f"the model has no label {value!r}", where=row.where, fix=fix)
    return int(value)


def _is_classifier(model: Any) -> bool:
    return "Classification" in type(model).__name__


def _has(example: Mapping[str, Any], column: str) -> bool:
    return example.get(column) is not None


def _row(example: Mapping[str, Any]) -> Row:
    return Row("the data", example)
