"""What a configuration says of its vocabulary, for another one: the number of rows, and the numbers of special tokens.

Numbers of special tokens go with the tokenizer: what the model says whose tokenizer is taken holds, and only what it
does not say is looked up by the token that the number stood for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from regraft.checkpoint import Checkpoint, read_json
from regraft.recipe.vocabulary import Vocabulary

_SUFFIX = "_token_id"
GENERATION = "generation_config.json"


def config_changes(vocabulary: Vocabulary, template: Checkpoint, key: str) -> dict[str, Any]:
    """Changes to config.json, by dotted key; `key`: that of the size of the vocabulary."""
    prefix = key.rpartition(".")[0]
    own, given = (_part(one.config, prefix) for one in (template, vocabulary.giver.checkpoint))
    changes = _numbers(own, [given], _translation(vocabulary, template))
    if own.get(key.rpartition(".")[2]) != vocabulary.rows:
        changes[key.rpartition(".")[2]] = vocabulary.rows
    return {f"{prefix}.{name}" if prefix else name: value for name, value in changes.items()}


def generation_changes(vocabulary: Vocabulary, template: Checkpoint) -> dict[str, Any]:
    """Changes to generation_config.json."""
    giver = vocabulary.giver.checkpoint
    own = _generation(template)
    if giver is template or not own:
        return {}
    return _numbers(own, [_generation(giver), giver.config], _translation(vocabulary, template))


def _numbers(
    own: Mapping[str, Any], given: list[Mapping[str, Any]], translated: Callable[[Any], Any]
) -> dict[str, Any]:
    changes = {}
    for key in dict.fromkeys(k for part in (own, given[0]) for k in part if k.endswith(_SUFFIX)):
        said = [part[key] for part in given if part.get(key) is not None]
        value = said[0] if said else translated(own.get(key))
        if value != own.get(key):
            changes[key] = value
    return changes


def _translation(vocabulary: Vocabulary, template: Checkpoint) -> Callable[[Any], Any]:
    tokens = {number: token for token, number in vocabulary.ids_of(template).items()}

    def translated(value: Any) -> Any:
        """A number, or a list of them, in the new vocabulary; those of tokens that it lacks are left out."""
        if isinstance(value, list):
            return [n for n in map(translated, value) if n is not None]
        if not isinstance(value, int):
            return value
        return vocabulary.table.ids.get(tokens[value]) if value in tokens else None

    return translated


def _part(config: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    for step in filter(None, prefix.split(".")):
        config = config.get(step) or {}
    return config


def _generation(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.files.get(GENERATION)
    found: Mapping[str, Any] = read_json(path) if path is not None else {}
    return found
