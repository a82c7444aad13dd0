"""What the tokenizer files of a model say, and a hash of what decides how text becomes numbers.

The hash covers vocabulary, merges, normalisation and added tokens. It does not depend on the order of keys, on spacing,
on the two spellings of merges, or on truncation and padding, which programs set when they run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from regraft.checkpoint import Checkpoint, read_json
from regraft.checkpoint.json_file import LIMIT
from regraft.checkpoint.paths import regular_size
from regraft.errors import UserError

_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Without tokenizer.json: the files that hold the vocabulary, in this order.
_OTHER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer, as far as its files tell.

    Attributes:
        kind: "BPE", "WordPiece", "Unigram", "WordLevel"; None if there is no tokenizer.json.
        size: tokens with the added ones; None if not known.
        special: role ("bos", "pad", ...) -> token; "extra" ones are in `added`.
        added: tokens beside the vocabulary, in order of their numbers.
        chat_template: whether there is one.
        hash: of all that decides the numbers, 16 hexadecimal digits.
        vocabulary_hash: of vocabulary and merges alone.
        remarks: files that could not be read.
    """

    kind: str | None
    size: int | None
    special: Mapping[str, str]
    added: tuple[str, ...]
    chat_template: bool
    hash: str | None
    vocabulary_hash: str | None
    remarks: tuple[str, ...] = ()


def tokenizer(checkpoint: Checkpoint) -> TokenizerFacts | None:
    """The tokenizer in a model's folder; None if there are no files of one."""
    files = checkpoint.files
    present = [name for name in _OTHER_FILES if name in files]
    remarks: list[str] = []
    settings = _read(files.get("tokenizer_config.json"), remarks)
    if "tokenizer.json" not in files and not present:
        return None
    special = _special(settings, _read(files.get("special_tokens_map.json"), remarks))
    template = "chat_template.jinja" in files or "chat_template.json" in files or bool(settings.get("chat_template"))
    if "tokenizer.json" in files:
        facts = _known(files["tokenizer.json"], remarks)
        if facts is not None:
            return replace(facts, special=special, chat_template=template, remarks=tuple(remarks))
        remarks.append("tokenizer.json holds no model")
        return TokenizerFacts(None, None, special, (), template, None, None, tuple(remarks))
    sha = hashlib.sha256()
    for name in present:
        sha.update(name.encode() + b"\n")
        with files[name].open("rb") as file:
            while piece := file.read(1 << 20):
                sha.update(piece)
    digest = sha.hexdigest()[:16]
    return TokenizerFacts(None, None, special, (), template, digest, digest, tuple(remarks))


@lru_cache(maxsize=1)
def _by_content() -> dict[bytes, TokenizerFacts]:
    """What was found in tokenizer.json files, by their digest: fine-tunes come with copies of one."""
    return {}


def _known(path: Path, remarks: list[str]) -> TokenizerFacts | None:
    """What a tokenizer.json tells by itself; None if it holds no model."""
    try:
        key = hashlib.blake2b(path.read_bytes()).digest() if regular_size(path) <= LIMIT else b""
    except (OSError, UserError):
        key = b""  # `_read` says what is wrong with it
    known = _by_content()
    if key in known:
        return known[key]
    content = _read(path, remarks)
    model = content.get("model")
    if not isinstance(model, Mapping):
        return None
    facts = _fast(content, model)
    if key:
        known[key] = facts
    return facts


def _fast(content: Mapping[str, Any], model: Mapping[str, Any]) -> TokenizerFacts:
    listed = content.get("added_tokens")
    entries = [e for e in _list(listed) if isinstance(e, Mapping) and isinstance(e.get("id"), int)]
    entries.sort(key=lambda e: int(e["id"]))
    own = dict(model)
    if isinstance(own.get("merges"), list):
        own["merges"] = [" ".join(map(str, m)) if isinstance(m, list) else m for m in own["merges"]]
    vocabulary = own.get("vocab")
    ids: set[int] = set()
    if isinstance(vocabulary, Mapping):
        ids = {i for i in vocabulary.values() if isinstance(i, int)}
    elif isinstance(vocabulary, list):
        ids = set(range(len(vocabulary)))
    whole = {"model": own, "added": entries, **{step: content.get(step) for step in _STEPS}}
    kind = model.get("type")
    return TokenizerFacts(
        kind=kind if isinstance(kind, str) else None,
        size=len(ids | {int(e["id"]) for e in entries}) if ids else None,
        special={},
        added=tuple(str(e.get("content")) for e in entries if int(e["id"]) not in ids),
        chat_template=False,
        hash=_digest(whole),
        vocabulary_hash=_digest([vocabulary, own.get("merges")]),
    )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _special(*sources: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        for role in _ROLES:
            token = source.get(f"{role}_token")
            text = token.get("content") if isinstance(token, Mapping) else token
            if isinstance(text, str):
                found.setdefault(role, text)
    return found


def _read(path: Path | None, remarks: list[str]) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        content: Mapping[str, Any] = read_json(path)
    except UserError as error:
        remarks.append(error.what)
        return {}
    return content


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
