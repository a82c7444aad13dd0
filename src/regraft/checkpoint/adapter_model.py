"""What an adapter changes about a model besides single tensors: tied weights, labels, vocabulary, class, tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.adapter_config import MERGE_FIRST, AdapterConfig
from regraft.checkpoint.lora import Renamed
from regraft.checkpoint.model import Checkpoint
from regraft.checkpoint.model_class import REFUSALS, bounded, loaded_names, model_class, without_weights
from regraft.checkpoint.paths import inside
from regraft.checkpoint.sidecars import TOKENIZER_FILES
from regraft.checkpoint.tensor import TensorSource, numel
from regraft.errors import UserError

_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_LABELLED = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
_PIECE = 1 << 22
_FEW = 1000  # layers that are built without weights in a few seconds


class Ties:
    """Tensors that the base stores once and uses under several names, and what an adapter makes of them.

    Which names these are stands in a pickled file, or else in the model's class (safetensors files do not say). The
    class is looked up in transformers, and only when an adapter touches a matrix that may be shared.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._class: dict[str, str] | None = None
        self._given: dict[str, TensorSource] = {}

    @property
    def of(self) -> dict[str, str]:
        """Name that is not stored -> name of the tensor that it shares."""
        stored = self._base.tensors
        by_class = {a: n for a, n in self._of_class().items() if a not in stored and n in stored}
        return by_class | dict(self._base.aliases)

    def before(self, alias: str) -> TensorSource:
        """The tensor behind an alias, before the step at hand."""
        return self._given.get(alias) or Renamed(self._base.tensors[self.of[alias]], alias)

    def give(self, alias: str, source: TensorSource) -> None:
        """Note what the adapter makes of an alias."""
        self._given[alias] = source

    def settle(
        self,
        tensors: Mapping[str, TensorSource],
        changed: Collection[str],
        shared: Mapping[str, TensorSource],
        config: AdapterConfig,
    ) -> tuple[dict[str, TensorSource], bool]:
        """Tensors to be stored under names that were aliases, and whether anything that was tied no longer is.

        Args:
            tensors: the adapted ones.
            changed: names of those that changed without their aliases.
            shared: tensors that the adapter brought for a name and its aliases alike.

        Raises:
            UserError: RG108 if a tensor is shared in a way that cannot be taken apart.
        """
        touched = [name for name in changed if self._may_be_shared(name)]
        if not self._given and not touched:
            return {}, False
        apart: dict[str, TensorSource] = {}
        for alias, name in self.of.items():
            given = self._given.get(alias)
            if given is None and name in touched:
                old = shared.get(name, self._base.tensors[name])
                follows = config.values.get("ensure_weight_tying") or old.shape != tensors[name].shape
                given = None if follows else Renamed(old, alias)
            if given is None or _same(given, tensors[name]):
                continue
            if sum(other == name for other in self.of.values()) > 1 or len(given.shape) != 2:
                what = f"the adapter changes only one of {alias} and {name}, which are one tensor in the base"
                raise config.refused(what)
            apart[alias] = given
        stored_twice = [
            alias
            for alias, name in self._of_class().items()
            if alias in self._base.tensors and (alias in changed or name in changed)
        ]
        if touched and not self.of and not stored_twice:
            self._refuse_unknown(touched[0], config)
        return apart, bool(apart or stored_twice)

    def _of_class(self) -> dict[str, str]:
        if self._class is None:
            kinds = self._base.architectures
            ties = getattr(model_class(kinds[0]), "_tied_weights_keys", None) if kinds else None
            self._class = dict(ties) if isinstance(ties, dict) else {}
        return self._class

    def _may_be_shared(self, name: str) -> bool:
        source = self._base.tensors.get(name)
        vocabularies = [part.get("vocab_size") for part in configs(self._base.config)]
        return source is not None and len(source.shape) == 2 and source.shape[0] in vocabularies

    def _refuse_unknown(self, name: str, config: AdapterConfig) -> None:
        shape = self._base.tensors[name].shape
        alone = sum(source.shape == shape for source in self._base.tensors.values()) == 1
        tied = any(part.get("tie_word_embeddings") for part in configs(self._base.config))
        if tied and alone and not self._of_class():
            what = f"the adapter changes {name}, which config.json ties to a head of unknown name"
            raise UserError("RG108", what, where=str(config.path), fix=MERGE_FIRST)


def module_names(base: Checkpoint) -> dict[str, str]:
    """Name of a parameter in memory -> stored name, where transformers renames tensors while it loads them.

    Built from the model's class, without weights. Tensors that loading splits or joins are left out, and so is
    everything if this transformers cannot tell.
    """
    kind = model_class("".join(base.architectures[:1]))
    if kind is None or not bounded(base.config, max(_FEW, len(base.tensors))):
        return {}
    try:
        model = without_weights(kind, base.config)
    except REFUSALS:  # a config that its own class refuses
        return {}
    return {loaded: name for name, loaded in loaded_names(model, base.tensors).items() if name != loaded}


def _same(one: TensorSource, other: TensorSource) -> bool:
    """Whether two tensors agree in every bit; stops at the first difference."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(
        torch.equal(one.read(at, at + _PIECE), other.read(at, at + _PIECE)) for at in range(0, numel(one), _PIECE)
    )


def configs(config: dict[str, Any] | Mapping[str, Any]) -> Iterator[Any]:
    """A config and those nested in it, such as `text_config`."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            yield from configs(value)


def adapted_config(
    base: Checkpoint,
    adapter: AdapterConfig,
    tensors: Mapping[str, TensorSource],
    heads: Collection[str],
    *,
    untied: bool,
) -> tuple[dict[str, Any], bool, list[str]]:
    """The config of the adapted model, whether its vocabulary changed, and remarks.

    Args:
        base, adapter: where the values come from.
        tensors: the adapted tensors.
        heads: names that modules_to_save replaced or added.
        untied: embedding and head are two tensors now.
    """
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    remarks: list[str] = []
    vocabulary = False
    for name, old in base.tensors.items():
        rows = tensors[name].shape[:1]
        parts = [part for part in configs(base.config) if part.get("vocab_size") == (old.shape or (None,))[0]]
        if parts and tensors[name].shape != old.shape:
            vocabulary = True
            remarks.append(f"the adapter resizes {name} from {old.shape[0]} to {rows[0]} tokens")
            for before, after in zip(configs(base.config), configs(config), strict=True):
                if before in parts:
                    after["vocab_size"] = rows[0]
    if untied:
        for part in configs(config):
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    added = [name for name in heads if name not in base.tensors]
    kind = ""
    if added:
        kind = _adapted_class(base, adapter)
        named = f"; with them it is a {kind}" if kind else ""
        remarks.append(f"the adapter adds {', '.join(added)}, which the base does not have{named}")
    if kind:
        config["architectures"] = [kind]
    if "".join(config.get("architectures") or ()).endswith(_LABELLED):
        remarks += _label(config, [tensors[name] for name in heads])
    return config, vocabulary, remarks


def _adapted_class(base: Checkpoint, adapter: AdapterConfig) -> str:
    """Class of the model with its new head, "" if it cannot be told."""
    stem = re.sub(r"(LMHead|For[A-Z]\w*)?(Model)?$", "", "".join(base.architectures[:1]))
    for name in (adapter.trained_class, stem + _TASK_CLASSES.get(adapter.task, "?")):
        if name and model_class(name) is not None:
            return name
    return ""


def _label(config: dict[str, Any], heads: Collection[TensorSource]) -> list[str]:
    """Make id2label fit a new classification head: the matrix of modules_to_save with the fewest rows."""
    rows = [source.shape[0] for source in heads if len(source.shape) == 2]
    names = config.get("id2label")
    known = len(names) if isinstance(names, dict) else 2  # what transformers assumes
    if not rows or min(rows) == known:
        return []
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(min(rows))}
    config["label2id"] = {f"LABEL_{i}": i for i in range(min(rows))}
    config.pop("num_labels", None)
    return [f"the adapter's head has {min(rows)} labels where the base's config has {known}; they have no names"]


def remark_on_base(base: Checkpoint, adapter: AdapterConfig, ref: str) -> list[str]:
    """A remark if the adapter names another base; paths and forks make that too common for an error."""
    names = {base.repo_id or base.path.name, base.path.name, base.ref.split("+")[0].split("@")[0]}
    if not adapter.base or any(name.rpartition("/")[2] == adapter.base.rpartition("/")[2] for name in names if name):
        return []
    return [f"{ref} was trained on {adapter.base}, and is applied to {base.repo_id or base.path.name}"]


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer in an adapter's folder, by file name; {} if it has none."""
    names = sorted({path.name for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})
    return {name: inside(folder, name, where=folder) for name in names if (folder / name).is_file()}
