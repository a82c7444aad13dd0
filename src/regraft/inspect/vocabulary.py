"""The tokens of a tokenizer.json with their numbers, and one that has those of several.

Tokens are added beside the vocabulary of the first tokenizer, as mergekit does: it goes on splitting text as it did,
except where the text of an added token stands. That keeps every number of the first one, and is the only way that works
for all kinds: merges of BPE and scores of Unigram have no meaning outside the vocabulary that they were learned with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from regraft.errors import UserError

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

    @property
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
    first: TokenTable, others: Sequence[TokenTable], more: Sequence[AddedToken] = (), *, where: str
) -> TokenTable:
    """`first` with all tokens of the others, and `more`, added behind its own.

    New tokens come model by model in the order of their numbers there, first those of the vocabularies, then the added
    ones. A token that is an added one anywhere is one in the result, with the settings of the first that has it.

    Raises:
        UserError: RG210 if the numbers of `first` have gaps that adding would fill otherwise than it says.
    """
    whole = Tokenizer.from_str(first.content)
    settings: dict[str, AddedToken] = {}
    for table in (first, *others):
        for token, setting in table.added.items():
            settings.setdefault(token, setting)
    for other in others:
        new = [token for token in other.ids if token not in first.ids and token not in settings]
        whole.add_tokens(sorted(new, key=other.ids.__getitem__))
    for setting in [*settings.values(), *more]:
        # Special tokens are skipped in decoding; which list a token is in follows from its own setting alone.
        (whole.add_special_tokens if setting.special else whole.add_tokens)([setting])
    found = token_table(whole.to_str(pretty=True), where=where)
    if found.ids != whole.get_vocab(with_added_tokens=True) or any(found.ids[t] != i for t, i in first.ids.items()):
        what = "its tokenizer.json gives other numbers to its tokens when some are added"
        raise UserError("RG210", what, where=where, fix="choose the tokenizer of one of the models as the source")
    return found


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
