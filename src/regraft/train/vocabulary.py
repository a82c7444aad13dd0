"""Whether two models read the same tokens, so that one can learn from the other on one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.errors import UserError
from regraft.inspect.loading import quiet

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds the files of a tokenizer; transformers makes up an empty one where it does not."""
    return any((folder / name).is_file() for name in _FILES)


def same_tokens(student: Path, teacher: Path) -> None:
    """Raise RG204 if the tokenizers of two models' folders have different vocabularies; models without one pass."""
    own, other = (vocabulary(folder) for folder in (student, teacher))
    if own is None or other is None or own == other:
        return
    different = next((token for token in own if other.get(token) != own[token]), next(iter(other)))
    what = f"student and teacher have different vocabularies ({len(own)} and {len(other)} tokens, first {different!r})"
    raise UserError("RG204", what, fix="take a student with the teacher's tokenizer")


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> number of the tokenizer in a model's folder; None if it has none. Raises RG602 for a broken one."""
    import transformers

    if not has_tokenizer(folder):
        return None
    try:
        with quiet():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"the tokenizer cannot be loaded: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        raise UserError("RG602", what, where=str(folder), fix="save the tokenizer beside the model") from None
    found: dict[str, int] = tokenizer.get_vocab()
    return found
