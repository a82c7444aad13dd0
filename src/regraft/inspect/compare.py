"""Comparing models: which differences of their configurations change what the weights compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_COSMETIC = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class Difference:
    key: str
    a: Any
    b: Any
    matters: bool


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    found = []
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            found.append(Difference(key, a.get(key), b.get(key), key not in _COSMETIC and "dropout" not in key))
    return found
