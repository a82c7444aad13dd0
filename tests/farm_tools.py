"""Pieces of the farm: tokenizers, cards, edits of saved folders, and the shape of the table of truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import models

VOCAB = models.VOCAB
WIDTH = 32
SILENT = ("licence", "languages", "training data", "base model", "task", "evaluation results")


@dataclass
class Entry:
    """One folder: `truth` maps dotted facts to values, `parent` is the entry that it was fine-tuned from."""

    path: Path
    truth: dict[str, Any] = field(default_factory=dict)
    parent: str = ""


Farm = dict[str, Entry]


def write_tokenizer(folder: Path, seed: int = 0, size: int = VOCAB, added: tuple[str, ...] = ()) -> None:
    """A word-level tokenizer of `size` tokens beside the `added` ones; another seed gives another order of words."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{(i * 7 + seed * 13) % (size - 4)}" for i in range(size - 4))]
    words = list(dict.fromkeys([*words, *(f"x{i}" for i in range(size))]))[:size]
    raw = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens(list(added))
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )
    fast.save_pretrained(folder)


def write_card(folder: Path, front: str | None, body: str = "A model.\n") -> None:
    head = f"---\n{front.strip()}\n---\n" if front is not None else ""
    (folder / "README.md").write_text(f"{head}# Model\n\n{body}", encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def truth_of(model: hf.PreTrainedModel, **more: Any) -> dict[str, Any]:
    """What transformers knows of its own object."""
    return {
        "kind": "model",
        "architecture.classes": (type(model).__name__,),
        "architecture.model_type": model.config.model_type,
        "architecture.known": True,
        "architecture.configured_vocabulary": getattr(model.config, "vocab_size", None),
        "size.parameters": model.num_parameters(),
        "size.dtypes": {"F32": model.num_parameters()},
        "scan.nan": 0,
        "scan.inf": 0,
        "adapter": None,
        "contradictions": [],
    } | more


def stack(i: int, **values: Any) -> dict[str, Any]:
    full = {"name": "", "layers": 2, "hidden": WIDTH, "heads": 4, "kv_heads": 4, "head_dim": 8, "ffn": 64} | values
    return {f"architecture.stacks.{i}.{key}": value for key, value in full.items()}


def save(model: hf.PreTrainedModel, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    return folder


LLAMA_TRUTH = {
    **stack(0, kv_heads=2),
    "architecture.vocabulary": VOCAB,
    "architecture.context": 64,
    "architecture.positions.kind": "rotary",
    "architecture.positions.theta": 10000.0,
    "architecture.positions.scaling": None,
    "architecture.head": "causal language model",
    "architecture.tied": False,
    "architecture.labels": None,
    "size.embeddings": VOCAB * WIDTH,
    "size.head": VOCAB * WIDTH,
    "size.tensors": 21,
    "tokenizer.kind": "WordLevel",
    "tokenizer.size": VOCAB,
    "tokenizer.special": {"bos": "[BOS]", "eos": "[EOS]", "unk": "[UNK]", "pad": "[PAD]"},
    "tokenizer.added": (),
    "tokenizer.chat_template": False,
}
NO_CARD = {"card.licences": (), "card.languages": (), "card.base_models": (), "card.silent": SILENT}
