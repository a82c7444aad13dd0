"""The tokens of a tokenizer.json with their numbers, and one that has those of several.

United is the first tokenizer with the tokens that it lacks behind its own, so that its numbers hold. It goes on cutting
text as it did, except where an added token of another one stands: new tokens of BPE come without merges and those of
Unigram with the lowest scores, for merges and scores mean nothing outside the vocabulary that they were learned with.
So a model can write these tokens, and is not made to read its own words in other pieces. WordPiece and WordLevel take
the longest token there is, new ones too.

Decided: not all as added tokens, as mergekit has it. These are found anywhere in a text, also within words, which cuts
"model" into "mo", "de" and "l", and puts a space before the rest where ▁ stands for spaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from regraft.errors import UserError

# Below the sum of the scores of any pieces that a word is cut into.
_NEVER_BETTER = 1e6
_SAVE_AGAIN = "load its tokenizer with AutoTokenizer, and save it beside the model"


@dataclass(frozen=True, eq=False)
class TokenTable:
    """What a tokenizer.json says.

    Attributes:
        ids: token -> number, the added ones with the others.
        added: tokens beside the vocabulary with their settings, in order of their numbers.
        kind: how it cuts text and writes tokens, such as "BPE of bytes". The same text means the same token only in
            tokenizers of one kind.
        content: the file.
    """

    ids: Mapping[str, int]
    added: Mapping[str, AddedToken]
    kind: str
    content: str

    @cached_property
    def size(self) -> int:
        """Rows that a model needs for it: one more than the largest number."""
        return max(self.ids.values(), default=-1) + 1


def token_table(content: str, *, where: str) -> TokenTable:
    """Read the text of a tokenizer.json.

    Raises:
        UserError: RG210 if the library cannot read it.
    """
    try:
        parsed = Tokenizer.from_str(content)
        steps = json.loads(content)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise UserError("RG210", f"tokenizer.json cannot be read: {reason}", where=where, fix=_SAVE_AGAIN) from None
    added = {token.content: token for _, token in sorted(parsed.get_added_tokens_decoder().items())}
    return TokenTable(parsed.get_vocab(with_added_tokens=True), added, _kind(steps), content)


def united(
    first: TokenTable, others: Sequence[TokenTable], more: Mapping[str, AddedToken], *, where: str
) -> TokenTable:
    """`first` with all tokens of the others behind its own, and `more` added tokens.

    New tokens come model by model in the order of their numbers there, first those of the vocabularies, then the added
    ones. A token that is an added one anywhere is one in the result, with the settings of the first that has it.

    Raises:
        UserError: RG210 for a kind of tokenizer that cannot be extended, or numbers that the library would not keep.
    """
    added: dict[str, AddedToken] = {}
    for table in (first, *others):
        for token, setting in table.added.items():
            added.setdefault(token, setting)
    added |= {token: setting for token, setting in more.items() if token not in added}
    new = [t for other in others for t in sorted(other.ids, key=other.ids.__getitem__) if t not in added]
    ids = dict(first.ids)
    ids |= {t: first.size + i for i, t in enumerate(dict.fromkeys(t for t in [*new, *added] if t not in first.ids))}
    content = json.loads(first.content)
    content["model"]["vocab"] = _extended(content["model"], ids, where)
    content["added_tokens"] = [
        {"id": ids[token], **_settings(added[token])} for token in sorted(added, key=ids.__getitem__)
    ]
    found = token_table(json.dumps(content, ensure_ascii=False, indent=2), where=where)
    if found.ids != ids:
        what = "the tokens of its tokenizer.json have numbers that do not stay when others are added"
        raise UserError("RG210", what, where=where, fix="choose the tokenizer of one of the models as the source")
    return found


def _extended(model: Mapping[str, Any], ids: Mapping[str, int], where: str) -> Any:
    """The vocabulary with all tokens, also the added ones, whose numbers hold only if they stand there."""
    old = model.get("vocab")
    if isinstance(old, Mapping):
        return dict(sorted(ids.items(), key=lambda item: item[1]))
    if isinstance(old, list):  # Unigram: tokens with scores, numbered by their place
        lowest = min((score for _, score in old), default=0.0) - _NEVER_BETTER
        return [*old, *([token, lowest] for token in sorted(ids, key=ids.__getitem__)[len(old) :])]
    what = f"tokens cannot be added to a tokenizer of the kind {model.get('type')}"
    raise UserError("RG210", what, where=where, fix="choose the tokenizer of one of the models as the source")


def _settings(token: AddedToken) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def _kind(steps: Mapping[str, Any]) -> str:
    name = str((steps.get("model") or {}).get("type"))
    types = {str(step.get("type")) for step in _steps([steps.get("decoder"), steps.get("pre_tokenizer")])}
    if "ByteLevel" in types:
        return f"{name} of bytes"
    patterns = [step.get("pattern") for step in _steps([steps.get("decoder"), steps.get("normalizer")])]
    marked = any("▁" in str(pattern) or pattern == {"String": " "} for pattern in patterns)
    return f"{name} with ▁ for spaces" if "Metaspace" in types or marked else name


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """All steps of a normalizer, pre-tokenizer or decoder, those of sequences one by one."""
    if isinstance(value, Mapping):
        yield value
        value = [v for v in value.values() if isinstance(v, list)]
    if isinstance(value, list):
        for part in value:
            yield from _steps(part)
