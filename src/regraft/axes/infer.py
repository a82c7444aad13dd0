"""Layers of a family without a table, from its names alone: groups `<path>.<number>.<rest>` that repeat.

A group is a stack of layers if its numbers run from 0 without a gap and most of them hold the same tensors, or if the
configuration gives just that number of layers. What lies outside is placed by the words in its name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from regraft.axes.place import Place

_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth")
_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|num_batches_tracked|running_mean|running_var)$")
_HEAD = re.compile(r"(^|\.|_)(head|heads|classifier|score|cls|qa_outputs|predictions|projector)(\.|_|$)")
_EMBEDDING = re.compile(r"(^|\.|_)(emb|embed|embeds|embedding|embeddings|wte|wpe|patch|tokens|shared)(\.|_|\d|$)")
_NORM = re.compile(r"(norm|(^|\.)ln)(_|\.|\d|$)", re.IGNORECASE)


class Inferred:
    """What names alone tell; see `regraft.axes.place.Scheme`."""

    def __init__(self, paths: Mapping[str, str], stacks: Mapping[str, int], count_keys: Mapping[str, str]) -> None:
        self._paths = paths  # path -> stack
        self.stacks = dict(stacks)
        self.count_keys = dict(count_keys)

    def split(self, name: str) -> tuple[str, str, int, str] | None:
        found = _numbered(name)
        if found is None or found[0] not in self._paths:
            return None
        path, number, rest = found
        return self._paths[path], f"{path}.", number, rest

    def outside(self, name: str) -> Place | None:
        if _HEAD.search(name):
            return Place(role="head", position="after")
        if _EMBEDDING.search(name):
            return Place(role="norm" if _NORM.search(name) else "embedding", position="before")
        if _NORM.search(name):
            return Place(role="norm", position="after")
        return None

    def part(self, rest: str) -> str | None:
        if _NORM.search(rest):
            return "norm"
        if re.search(r"att", rest, re.IGNORECASE):
            return "attention"
        return "ffn" if re.search(r"mlp|ffn|feed_forward|(^|\.)fc\d?|expert", rest, re.IGNORECASE) else None

    def bare(self, name: str) -> str:
        return name

    def buffer(self, name: str) -> bool:
        return _BUFFERS.search(name) is not None

    def transposed(self, rest: str) -> bool:
        return False  # names do not tell


def infer(config: Mapping[str, Any], names: Collection[str]) -> Inferred:
    """Stacks of layers among `names`; `config` confirms their number of layers where it can."""
    groups: dict[str, dict[int, set[str]]] = {}
    for name in names:
        found = _numbered(name)
        if found is not None and not _HEAD.search(found[0]):
            path, number, rest = found
            groups.setdefault(path, {}).setdefault(number, set()).add(rest)
    counts = {key: config[key] for key in _COUNT_KEYS if isinstance(config.get(key), int)}
    paths = [path for path, layers in groups.items() if _is_stack(layers, counts)]
    stacks = dict(zip(paths, _short_names(paths), strict=True))
    sizes = {stack: len(groups[path]) for path, stack in stacks.items()}
    keys: dict[str, str] = {}
    if len(sizes) == 1:
        ((stack, size),) = sizes.items()
        keys.update((stack, key) for key in [k for k, value in counts.items() if value == size][:1])
    return Inferred(stacks, sizes, keys)


def _numbered(name: str) -> tuple[str, int, str] | None:
    """(path, number, rest) at the first component that is a number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and 0 < i < len(parts) - 1:
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return None


def _is_stack(layers: Mapping[int, set[str]], counts: Mapping[str, int]) -> bool:
    if sorted(layers) != list(range(len(layers))):
        return False
    if len(layers) in counts.values():
        return True
    ((_, most),) = Counter(frozenset(rests) for rests in layers.values()).most_common(1)
    return len(layers) > 1 and 2 * most > len(layers)


def _short_names(paths: list[str]) -> list[str]:
    """Paths without the components that all of them begin or end with; "" for a single one."""
    if len(paths) < 2:
        return [""] * len(paths)
    split = [path.split(".") for path in paths]
    head, tail = 0, 0
    while all(len(p) > head + 1 and p[head] == split[0][head] for p in split):
        head += 1
    while all(len(p) - tail > head + 1 and p[-1 - tail] == split[0][-1 - tail] for p in split):
        tail += 1
    return [".".join(p[head : len(p) - tail]) for p in split]
