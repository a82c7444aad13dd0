"""Which files of a model on the Hub are needed, decided from their names before anything is downloaded.

One set of weights is taken, in the order in which `from_pretrained` looks for them, so that safetensors come before
pickles and the same weights in another format (GGUF, ONNX, TensorFlow, original/) are never touched. Of the rest, the
files that a merged model can inherit are taken, and no folders but chat templates and sentence-transformers modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from regraft.checkpoint.licences import LICENCE_FILES
from regraft.checkpoint.paths import WEIGHT_SUFFIXES
from regraft.checkpoint.sidecars import MODEL_FILES, TOKENIZER_FILES
from regraft.checkpoint.weights import ADAPTER_CONFIG, CANDIDATES, DELTA_RECORD, is_weight_file, listed
from regraft.errors import UserError

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_OTHERS = ("config.json", "generation_config.json", "regraft.json", ADAPTER_CONFIG, DELTA_RECORD, "*.py")
_BELOW = re.compile(r"(additional_chat_templates/[^/]+\.jinja|\d+_\w+/[^/]+\.(json|txt|safetensors))")


@dataclass(frozen=True)
class Choice:
    """Files to be downloaded, the small ones first. If `index` is set, it names the files that hold the weights."""

    small: tuple[str, ...]
    weights: tuple[str, ...]
    index: str = ""


def choose(names: Collection[str], where: str, named: str = "") -> Choice:
    """The files of a model, an adapter or a delta that are needed.

    Args:
        names: paths in the repository.
        where: the model, for messages.
        named: the file of weights that the model's config asks for, if it does (`transformers_weights`).

    Raises:
        UserError: RG102 if there are no weights that can be read.
    """
    beside = "files/" if DELTA_RECORD in names else ""  # where a delta keeps what is not its base's
    small = sorted(name for name in names if _is_small(name.removeprefix(beside)))
    candidates = (named, *CANDIDATES) if is_weight_file(named) else CANDIDATES
    weights = [name for name in candidates if name in names][:1]
    if ADAPTER_CONFIG in names:
        weights += [name for name in _ADAPTER_WEIGHTS if name in names][:1]
    if not weights:
        raise _nothing(names, where)
    index = weights.pop(0) if weights[0].endswith(".index.json") else ""
    return Choice(tuple(small), tuple(weights), index)


def shards(index: Mapping[str, Any], names: Collection[str], where: str) -> tuple[str, ...]:
    """The files that an index names.

    Raises:
        UserError: RG105 if it names none; RG102 if the model lacks some of them.
    """
    given = index.get("weight_map")
    files = sorted({str(file) for file in given.values()}) if isinstance(given, dict) else []
    if not files:
        raise UserError("RG105", "the index names no files", where=where, fix="tell the model's authors")
    missing = [file for file in files if file not in names or not file.endswith(WEIGHT_SUFFIXES)]
    if missing:
        what = f"the index names {listed(missing)}, which the model does not have"
        raise UserError("RG102", what, where=where, fix="tell the model's authors, or use another revision")
    return tuple(files)


def _is_small(name: str) -> bool:
    if "/" in name:
        return _BELOW.fullmatch(name) is not None
    wanted = any(fnmatchcase(name, pattern) for pattern in (*TOKENIZER_FILES, *MODEL_FILES, *_OTHERS))
    return wanted or any(fnmatchcase(name.upper(), pattern) for pattern in ("README.MD", *LICENCE_FILES))


def _nothing(names: Collection[str], where: str) -> UserError:
    there = sorted(name for name in names if is_weight_file(name))
    if not there:
        fix = "name a repository that holds a model, or another revision"
        return UserError("RG102", "there are no weights in the repository", where=where, fix=fix)
    what = f"{listed(there)} cannot be read, and there is no {' or '.join(CANDIDATES[::2])}"
    return UserError("RG102", what, where=where, fix="use the model that these files were made from")
