"""The section `tokenizer` of a recipe, which both languages spell alike:

    tokenizer:
      source: union                # or base, or a model
      tokens:
        "<|im_start|>": {source: chat, force: true}
        "<|pad|>": {source: {kind: zero}}
        "<|end|>": {source: {kind: model_token, model: chat, token: "<|im_end|>"}}
      pad_to_multiple_of: 64

The short form is its `source` alone: `tokenizer: union`, in mergekit `tokenizer_source: union`. Only what texts can
tell is checked here; which tokens the models have is left to the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from regraft.errors import nearest
from regraft.recipe.document import TokenRow, VocabularyChoice
from regraft.recipe.fields import Field

KEYS = ("source", "tokens", "pad_to_multiple_of")
KINDS = ("model_token", "zero")
MAX_PAD = 1 << 20
_MAX_ID = 2**31 - 1

# The text that names a model in the typed form of the recipe.
Reference = Callable[[Field], str]


def read_tokenizer(field: Field, reference: Reference, base: str | None, *, union_by_default: bool) -> VocabularyChoice:
    """The section.

    Args:
        reference: reads a field that names a model.
        base: what "base" stands for.
        union_by_default: `source` may be missing.

    Raises:
        UserError: RG302 and RG303 for what is written, RG304 for "base" without one.
    """
    items = {key: item for key, item in field.check_keys(KEYS, "tokenizer").items() if not item.is_null}
    if "source" not in items and not union_by_default:
        raise field.error("RG303", "tokenizer needs 'source'", "add source: union, base, or one of the models")
    chosen = _source(items["source"], reference, base) if "source" in items else None
    tokens = {}
    if "tokens" in items:
        for token, item in items["tokens"].items("a mapping: tokens, and the source of each").items():
            tokens[token] = _token(item, reference, base)
    pad = items["pad_to_multiple_of"].integer(1, MAX_PAD) if "pad_to_multiple_of" in items else None
    return VocabularyChoice(chosen, tokens, pad, field.where)


def read_source(field: Field, reference: Reference, base: str | None) -> VocabularyChoice:
    """The short form, which is the text of `source` alone."""
    return VocabularyChoice(_source(field, reference, base), where=field.where)


def _source(field: Field, reference: Reference, base: str | None) -> str | None:
    """A model, or None for "union"."""
    if field.value == "union":
        return None
    return _model(field, reference, base)


def _model(field: Field, reference: Reference, base: str | None) -> str:
    if field.value == "base" and base is not None:
        return base
    return reference(field)


def _token(field: Field, reference: Reference, base: str | None) -> TokenRow:
    items = field.check_keys(("source", "force"), "a token")
    if "source" not in items or items["source"].is_null:
        raise field.error("RG303", "the token has no source", "add source: a model, or {kind: zero}")
    force = items["force"].boolean() if "force" in items else False
    source = items["source"]
    if not source.is_mapping or "kind" not in source.items():
        return TokenRow(_model(source, reference, base), force=force, where=field.where)
    parts = source.items()
    kind = parts["kind"].text("model_token or zero")
    if kind not in KINDS:
        raise parts["kind"].error("RG303", f"kind is {kind!r}", nearest(kind, KINDS))
    if kind == "zero":
        source.check_keys(("kind",), "a source of kind zero")
        return TokenRow(None, force=force, where=field.where)
    return _model_token(source, reference, base, force, field.where)


def _model_token(source: Field, reference: Reference, base: str | None, force: bool, where: str) -> TokenRow:
    parts = source.check_keys(("kind", "model", "token", "token_id"), "a source of kind model_token")
    given: Mapping[str, Field] = {key: item for key, item in parts.items() if not item.is_null}
    if "model" not in given or ("token" in given) == ("token_id" in given):
        what = "a source of kind model_token needs a model, and either token or token_id"
        raise source.error("RG303", what, "write {kind: model_token, model: ..., token: ...}")
    model = _model(given["model"], reference, base)
    if "token" in given:
        return TokenRow(model, token=given["token"].exact_text("a token"), force=force, where=where)
    return TokenRow(model, token_id=given["token_id"].integer(0, _MAX_ID), force=force, where=where)
