"""Tiny tokenizers of every kind, trained on a few sentences, and models with an embedding of their size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from models import save_model

PLAIN = [
    "the quick brown fox jumps over the lazy dog",
    "a model that is merged with a model is a model again",
    "naïve cafés, déjà vu and 12 other words",
]
CODE = ["def add(left, right): return left + right", "for i in range(10): print(i)", "while true: pass"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def bpe(texts: Sequence[str], size: int = 300) -> Tokenizer:
    """Byte-level, as GPT-2 and Qwen have it."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def unigram(texts: Sequence[str], size: int = 60) -> Tokenizer:
    """With ▁ for spaces, as T5 has it."""
    made = Tokenizer(kinds.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    return made


def wordpiece(texts: Sequence[str], size: int = 80) -> Tokenizer:
    """With ## for what goes on a word, as BERT has it."""
    made = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL))
    return made


KINDS = {"bpe": bpe, "unigram": unigram, "wordpiece": wordpiece}


def save(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    family: str = "llama",
    seed: int = 0,
    special: Sequence[str] = (),
    padding: int = 0,
    **changes: Any,
) -> Path:
    """A model with this tokenizer, more special tokens, and rows of padding."""
    made = Tokenizer.from_str(tokenizer.to_str())
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    rows = made.get_vocab_size() + padding
    numbers = {
        "bos_token_id": made.token_to_id("<s>"),
        "eos_token_id": made.token_to_id(special[-1] if special else "</s>"),
    }
    save_model(folder, family, seed, vocab_size=rows, **numbers | changes)
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token=special[-1] if special else "</s>"
    )
    fast.save_pretrained(folder)
    return folder


def tokens_of(folder: Path) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found
