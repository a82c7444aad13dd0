"""What config.json and the tensors' headers say of a model's shape. What neither says is None."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.axes import Layout
from regraft.checkpoint import Checkpoint, numel
from regraft.checkpoint.weights import ADAPTER_CONFIG

# One fact, the keys that configurations of different families have for it.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM = ("head_dim", "d_kv")
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_FFN = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_LABEL = re.compile(r"LABEL_\d+")
# End of a class name -> what the head is for.
_TASKS = {
    "CausalLM": "causal language model",
    "LMHeadModel": "causal language model",
    "DoubleHeadsModel": "causal language model and multiple choice",
    "MaskedLM": "masked language model",
    "PreTraining": "pre-training",
    "ConditionalGeneration": "sequence to sequence",
    "SequenceClassification": "sequence classification",
    "TokenClassification": "token classification",
    "QuestionAnswering": "question answering",
    "MultipleChoice": "multiple choice",
    "ImageClassification": "image classification",
    "ImageClassificationWithTeacher": "image classification",
    "MaskedImageModeling": "masked image model",
}
_LANGUAGE_HEADS = ("CausalLM", "LMHeadModel", "DoubleHeadsModel", "MaskedLM", "PreTraining", "ConditionalGeneration")
_CONTRASTIVE = ("CLIPModel", "SiglipModel")


@dataclass(frozen=True)
class Stack:
    """One pile of layers: "" for the only one, else "encoder", "text", ...

    `layers` are those that have tensors, None if no weights could be read.
    """

    name: str
    layers: int | None
    configured_layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    ffn: int | None


@dataclass(frozen=True)
class Positions:
    """How positions enter: `kind` is "rotary", "learned", "relative", "sinusoidal" or "alibi".

    `theta` and `scaling` (None if it is the default) belong to rotary ones.
    """

    kind: str | None = None
    theta: float | None = None
    scaling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Architecture:
    """Shape of a model.

    Attributes:
        classes, model_type: as in config.json.
        known: whether regraft has a table of this family; if not, layers are inferred from names.
        stacks: the piles of layers.
        vocabulary: rows of the token embedding, where that is stored and known.
        configured_vocabulary: `vocab_size`.
        context: most positions, None where positions set no limit.
        head: what the output is for; "none" for a bare model.
        tied: whether embedding and head are one tensor; None if there is no language-model head or it is not known.
        labels: names of the classes in order of their numbers; None if none are given.
        generic_labels: whether those are LABEL_0, LABEL_1, ... which say nothing.
    """

    classes: tuple[str, ...]
    model_type: str | None
    known: bool
    stacks: tuple[Stack, ...]
    vocabulary: int | None
    configured_vocabulary: int | None
    context: int | None
    positions: Positions
    head: str | None
    tied: bool | None
    labels: tuple[str, ...] | None
    generic_labels: bool
    remarks: tuple[str, ...] = field(default=())


def architecture(checkpoint: Checkpoint, own: Layout) -> Architecture:
    """The shape of a checkpoint, from its config and headers."""
    config = checkpoint.config
    text = _sub(config, "text")
    classes = checkpoint.architectures
    tokens = checkpoint.tensors.get(checkpoint.aliases.get(own.tokens, own.tokens))
    labels = _labels(config, classes)
    return Architecture(
        classes=classes,
        model_type=checkpoint.model_type or None,
        known=own.known,
        stacks=tuple(_stack(config, own, name) for name in own.stacks or (own.table.stacks if own.table else ())),
        vocabulary=tokens.shape[0] if tokens is not None and tokens.shape else None,
        configured_vocabulary=_int(config, "vocab_size") or _int(text, "vocab_size"),
        context=_context(config, text, own),
        positions=_positions(config, text, own),
        head=_head(classes),
        tied=_tied(checkpoint, own),
        labels=labels,
        generic_labels=bool(labels) and all(_LABEL.fullmatch(label) for label in labels or ()),
        remarks=tuple(_remarks(checkpoint, own)),
    )


def _sub(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(f"{name}_config") if name else None
    return found if isinstance(found, Mapping) else config


def _int(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _stack(config: Mapping[str, Any], own: Layout, name: str) -> Stack:
    sub = _sub(config, name)
    width, heads = _int(sub, *_WIDTH), _int(sub, f"{name}_attention_heads", *_HEADS)
    key = own.table.stacks[name].count if own.table is not None else own.layer_count_key.get(name, "")
    configured = _int(sub, key.rpartition(".")[2])
    if configured is None and name == "decoder":  # T5 leaves the decoder's number out where it is the encoder's
        configured = _int(sub, "num_layers")
    ffn = _int(sub, f"{name}_ffn_dim", *_FFN)
    if ffn is None and width and "n_inner" in sub:
        ffn = 4 * width  # null means this, by the definition of the family
    exact = width // heads if width and heads and width % heads == 0 else None
    return Stack(
        name=name,
        layers=own.stacks.get(name),
        configured_layers=configured,
        hidden=width,
        heads=heads,
        kv_heads=1 if sub.get("multi_query") is True else _int(sub, *_KV_HEADS) or heads,
        head_dim=_int(sub, *_HEAD_DIM) or exact,
        ffn=ffn,
    )


def _context(config: Mapping[str, Any], text: Mapping[str, Any], own: Layout) -> int | None:
    table = own.table
    if table is not None and (table.positions == "relative" or not table.tokens):
        return None
    found = _int(text, *_CONTEXT)
    if found is not None and table is not None and table.padded_positions:
        padding = _int(config, "pad_token_id")
        return found - padding - 1 if padding is not None else None
    return found


def _positions(config: Mapping[str, Any], text: Mapping[str, Any], own: Layout) -> Positions:
    rope: Mapping[str, Any] = next(
        (text[k] for k in ("rope_parameters", "rope_scaling") if isinstance(text.get(k), Mapping)), {}
    )
    theta = rope.get("rope_theta", text.get("rope_theta"))
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    if scaling.get("rope_type", scaling.get("type", "default")) == "default" and len(scaling) <= 1:
        scaling = {}
    kind = own.table.positions if own.table is not None else None
    if config.get("sinusoidal_pos_embds") is True:
        kind = "sinusoidal"
    elif kind is None and (theta is not None or rope):
        kind = "rotary"
    elif kind is None and config.get("alibi") is True:
        kind = "alibi"
    elif str(text.get("position_embedding_type", "absolute")).startswith("relative"):
        kind = "relative"
    if kind != "rotary":
        return Positions(kind)
    return Positions(kind, float(theta) if isinstance(theta, (int, float)) else None, scaling or None)


def _head(classes: tuple[str, ...]) -> str | None:
    if not classes:
        return None
    name = classes[0]
    if name in _CONTRASTIVE:
        return "similarity of text and image"
    found = re.search(r"For([A-Z]\w*)$", name)
    ending = found[1] if found else next((e for e in _TASKS if name.endswith(e)), "")
    if ending:
        return _TASKS.get(ending, " ".join(re.findall(r"[A-Z][a-z]+|[A-Z]+(?![a-z])", ending)).lower())
    return "none" if name.endswith("Model") else None


def _language_head(classes: tuple[str, ...]) -> bool:
    return bool(classes) and classes[0].endswith(_LANGUAGE_HEADS)


def _tied(checkpoint: Checkpoint, own: Layout) -> bool | None:
    if not checkpoint.tensors or not _language_head(checkpoint.architectures):
        return None
    if not own.known:
        given = checkpoint.config.get("tie_word_embeddings")
        return given if isinstance(given, bool) else None
    return any(own.tokens in pair and own.place(pair[0]).role != own.place(pair[1]).role for pair in own.tied)


def _labels(config: Mapping[str, Any], classes: tuple[str, ...]) -> tuple[str, ...] | None:
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not any("Classification" in c for c in classes):
        return None
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        return None


def _remarks(checkpoint: Checkpoint, own: Layout) -> list[str]:
    found = []
    if not checkpoint.config and ADAPTER_CONFIG not in checkpoint.files:
        found.append("there is no config.json: what the model computes is not known")
    if not checkpoint.tensors:
        return found
    if own.known:
        strange = own.unplaced(checkpoint.tensors)
        if strange:
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            family = own.family or "this family"
            found.append(f"{', '.join(strange[:3])}{more}: no tensors that models of type {family} have")
        if _lacks_head(checkpoint, own):
            found.append(
                f"no tensors of the head that {checkpoint.architectures[0]} has: it would start from random values"
            )
    return found


def _lacks_head(checkpoint: Checkpoint, own: Layout) -> bool:
    classes = checkpoint.architectures
    if not classes or _head(classes) in (None, "none") or classes[0] in _CONTRASTIVE or _tied(checkpoint, own):
        return False
    return not any(own.place(name).role == "head" for name in checkpoint.tensors)


def counts(checkpoint: Checkpoint, own: Layout) -> tuple[int, int, int]:
    """(parameters, of them in input embeddings, of them in heads); tied tensors count once, stored constants do not."""
    total = embeddings = heads = 0
    copies = {alias for alias, canonical in own.tied if canonical in checkpoint.tensors}
    for name, source in checkpoint.tensors.items():
        role = own.place(name).role
        if not source.dtype.is_floating_point or role == "buffer" or name in copies:
            continue
        size = numel(source)
        total += size
        embeddings += size if role == "embedding" else 0
        heads += size if role == "head" else 0
    return total, embeddings, heads
