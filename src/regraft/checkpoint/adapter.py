"""Applying a PEFT adapter to a checkpoint: every changed tensor becomes a source that adds the change when it is read.

The result is what peft's `merge_and_unload` computes, with two deliberate differences. Sums are made in float32 and
rounded once, not in the dtype of the adapter. And where embedding and head share one tensor and the adapter changes
only one of them, both are kept from then on, as the adapted model used them; merging in place would change both.
Adapters applied one after another compose: each sees the result of those before it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from regraft.checkpoint.adapter_config import MERGE_FIRST, AdapterConfig
from regraft.checkpoint.adapter_keys import AdapterKeys, Names, sort_keys
from regraft.checkpoint.adapter_model import Ties, adapted_config, module_names, remark_on_base, tokenizer_files
from regraft.checkpoint.lora import AddedVector, LoraTensor, Renamed, ReplacedRows, ScaledTensor
from regraft.checkpoint.model import Checkpoint
from regraft.checkpoint.paths import inside
from regraft.checkpoint.pickle_file import read_pickle
from regraft.checkpoint.safetensors_file import read_safetensors
from regraft.checkpoint.tensor import TensorSource, numel
from regraft.errors import UserError

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def apply(base: Checkpoint, folder: Path, ref: str) -> Checkpoint:
    """The checkpoint with a LoRA or IA3 adapter applied; reads headers and, rarely, one embedding.

    Supported: rank-stabilised LoRA, rank and alpha patterns, DoRA, transposed layers (GPT-2), embeddings,
    convolutions, biases, modules_to_save, trained tokens. Tensors keep the base's names and dtypes; what
    modules_to_save brings keeps the adapter's dtype.

    Args:
        base: the model that the adapter was trained on.
        folder: holds adapter_config.json and adapter_model.safetensors (or .bin, read without running code).
        ref: the adapter as the user wrote it.

    Raises:
        UserError: RG108 if the adapter is of another kind or does not fit (with the first key and both shapes); RG103,
            RG104, RG105, RG106, RG107, RG111 for its files; RG109 if it would change tensors that hold no floats.
    """
    config = AdapterConfig(folder)
    path, sources = _weights(folder)
    return _Application(base, config, sort_keys(sources, path), path).result(folder, ref)


def _weights(folder: Path) -> tuple[Path, Mapping[str, TensorSource]]:
    for name in _FILES:
        path = inside(folder, name, where=folder)
        if path.is_symlink() or path.exists():
            sources = read_safetensors(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
            if not sources:
                raise UserError("RG108", "the adapter file holds no tensors", where=str(path), fix="save it again")
            return path, sources
    fix = "download or save the adapter again"
    raise UserError("RG108", f"the adapter has no {' or '.join(_FILES)}", where=str(folder), fix=fix)


class _Application:
    """One adapter on its way into one base. The steps run in the order in which they stand here."""

    def __init__(self, base: Checkpoint, config: AdapterConfig, keys: AdapterKeys, path: Path) -> None:
        self.base, self.config, self.keys, self.path = base, config, keys, path
        self.tensors: dict[str, TensorSource] = dict(base.tensors)
        self.ties = Ties(base)
        self.changed: set[str] = set()  # by their stored names, where an alias does not follow
        self.shared: dict[str, TensorSource] = {}
        targets = [f"{module}.weight" for module in (*keys.modules, *keys.tokens)]
        targets = targets or [name for name in keys.whole if not config.saved(name)]
        if not (targets or keys.whole):
            raise self._misfit("the file has no key of an adapter", "save it again with peft's save_pretrained")
        stored = {*base.tensors, *base.aliases}
        if not stored.intersection(targets):
            stored.update(self.ties.of)
        self.names = Names(targets, stored, lru_cache(None)(lambda: module_names(base)), str(path))

    def result(self, folder: Path, ref: str) -> Checkpoint:
        """The adapted checkpoint."""
        heads = [self._replace(name, source) for name, source in self.keys.whole.items()]
        for module, rows in self.keys.tokens.items():
            self._replace_tokens(module, rows)
        for module, parts in self.keys.modules.items():
            if "scale" in parts:
                self._scale(module, parts["scale"])
            else:
                self._add_product(module, parts)
        self._check_complete()
        apart, untied = self.ties.settle(self.tensors, self.changed, self.shared, self.config)
        remarks = [
            f"{alias} is tied to {self.ties.of[alias]} in the base; with the adapter they are two" for alias in apart
        ]
        self.tensors |= apart
        named = [name for name in heads if name in self.tensors]
        config, vocabulary, more = adapted_config(self.base, self.config, self.tensors, named, untied=untied)
        stats = [(path.name, path.stat()) for path in (self.config.path, self.path)]
        return dataclasses.replace(
            self.base,
            tensors=self.tensors,
            aliases={alias: name for alias, name in self.base.aliases.items() if alias not in apart},
            config=config,
            files=dict(self.base.files) | (tokenizer_files(folder) if vocabulary else {}),
            adapters=(*self.base.adapters, ref),
            folders=(*self.base.folders, folder),
            remarks=(*self.base.remarks, *remark_on_base(self.base, self.config, ref), *remarks, *more),
            stamps=(*self.base.stamps, *(f"+{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)),
        )

    def _replace(self, name: str, source: TensorSource) -> str:
        """A parameter that the adapter holds whole; returns its name if it belongs to modules_to_save, else ""."""
        saved = self.config.saved(name)
        there, alias = self._place(name)
        if alias:
            self.ties.give(alias, Renamed(source, alias))
        elif there:
            old = self.tensors[there]
            resized = (saved or len(old.shape) == 2) and source.shape[1:] == old.shape[1:] and len(old.shape) > 0
            if source.shape != old.shape and not resized:
                raise self._shapes(self.keys.keys[name], source, old)
            self.tensors[there] = Renamed(source, there)
            if saved:
                self.changed.add(there)
            else:
                self.shared[there] = self.tensors[there]
        elif saved:
            there = self.names.new(name)
            self.tensors[there] = Renamed(source, there)
        else:
            raise self._misfit(f"{self.keys.keys[name]} replaces a tensor that the base does not have")
        return (there or "") if saved else ""

    def _replace_tokens(self, module: str, rows: TensorSource) -> None:
        """Some rows of an embedding; a head that is tied to it follows, as in peft."""
        old, alias = self._target(f"{module}.weight", module)
        if len(old.shape) != 2 or len(rows.shape) != 2 or rows.shape[1] != old.shape[1]:
            raise self._shapes(self.keys.keys[module], rows, old)
        if module in self.keys.modules or alias:
            raise self.config.refused(f"trained tokens of {module} cannot be applied beside another change of it")
        self.tensors[old.name] = ReplacedRows(old, rows, self.config.indices(module, rows.shape[0], old.shape[0]))
        self.shared[old.name] = self.tensors[old.name]

    def _add_product(self, module: str, parts: Mapping[str, TensorSource]) -> None:
        """LoRA and DoRA."""
        embedding = "embedding down" in parts or "embedding up" in parts
        needed = ["embedding down", "embedding up"] if embedding else ["down", "up"]
        needed += ["magnitude"] if self.config.dora else []
        optional = set() if embedding else {"up bias"}
        if set(parts) - optional != set(needed):
            what = f"{module} has {', '.join(sorted(parts))} in the file where {', '.join(needed)} are needed"
            raise self._misfit(what, "download or save the adapter again")
        down, up, magnitude = parts[needed[0]], parts[needed[1]], parts.get("magnitude")
        old, alias = self._target(f"{module}.weight", module)
        transposed = self._check_factors(module, old, down, up, embedding)
        outputs = up.shape[0]
        if magnitude is not None and (numel(magnitude) != outputs):
            what = f"{module} has a magnitude of shape {magnitude.shape} for {outputs} outputs"
            raise self._misfit(what, "download or save the adapter again")
        scaling = self.config.scaling(module)
        self._put(old, alias, LoraTensor(old, down, up, scaling, transposed=transposed, magnitude=magnitude))
        if "up bias" in parts:
            self._add_bias(module, parts["up bias"], scaling)

    def _check_factors(
        self, module: str, old: TensorSource, down: TensorSource, up: TensorSource, embedding: bool
    ) -> bool:
        """Refuse factors that do not make this weight; return whether it is stored transposed."""
        key, rank = self.keys.keys[module], self.config.rank(module)
        if len(down.shape) < 2 or len(up.shape) < 2 or down.shape[0] != up.shape[1] or down.shape[0] != rank:
            if len(old.shape) > 2 and len(up.shape) > 2 and up.shape[1:2] != down.shape[:1]:
                raise self._misfit(f"{key} changes a convolution in groups, which is no sum of weights", MERGE_FIRST)
            what = f"{module}: A is {down.shape} and B is {up.shape}, which do not make rank {rank}"
            raise self._misfit(what, "use the adapter_config.json that belongs to the file")
        if len(down.shape) > 2:
            if down.shape[1:] != old.shape[1:] or up.shape[0] != old.shape[0] or set(up.shape[2:]) != {1}:
                raise self._factors(module, old, down, up)
            return False
        if len(old.shape) > 2:
            raise self._misfit(f"{key} changes a stack of matrices of shape {old.shape} (experts)", MERGE_FIRST)
        straight, turned = (up.shape[0], down.shape[1]), (down.shape[1], up.shape[0])
        if old.shape not in ((turned,) if embedding else (straight, turned)):
            raise self._factors(module, old, down, up)
        return embedding or self._transposed(old, straight)

    def _transposed(self, weight: TensorSource, straight: tuple[int, ...]) -> bool:
        """Whether a matrix is stored (in, out); for a square one its neighbours tell.

        The config's fan_in_fan_out holds for the module that peft wrapped last, so it is asked last: a bias has as
        many elements as its weight has outputs, which settles it for a layer of the same block that is not square.
        """
        if straight[0] != straight[1]:
            return weight.shape != straight
        prefix = weight.name.removesuffix("weight")
        if f"{prefix}bias" not in self.base.tensors:
            return False  # layers that are stored transposed always have a bias
        best, verdict = -1, self.config.transposed
        for name, other in self.base.tensors.items():
            bias = self.base.tensors.get(f"{name.removesuffix('weight')}bias") if name.endswith(".weight") else None
            if bias is None or len(other.shape) != 2 or other.shape[0] == other.shape[1] or len(bias.shape) != 1:
                continue
            shared = len(_common(name, weight.name))
            if shared > best and bias.shape[0] in other.shape:
                best, verdict = shared, bias.shape[0] == other.shape[1]
        return verdict

    def _scale(self, module: str, factors: TensorSource) -> None:
        """IA3: (outputs, 1) scales the outputs and the bias, (1, inputs) the inputs."""
        old, alias = self._target(f"{module}.weight", module)
        if len(old.shape) != 2 or len(factors.shape) != 2 or 1 not in factors.shape:
            raise self.config.refused(f"IA3 on {module}, a tensor of shape {old.shape}, cannot be applied")
        outputs = factors.shape[1] == 1
        count = numel(factors)
        if count not in old.shape:
            raise self._shapes(self.keys.keys[module], factors, old)
        other = old.shape[1 - old.shape.index(count)]
        transposed = self._transposed(old, (count, other) if outputs else (other, count))
        self._put(old, alias, ScaledTensor(old, factors, by_row=outputs != transposed))
        bias, _ = self._place(f"{module}.bias")
        if outputs and bias:
            before = self.tensors[bias]
            if before.shape != (count,):
                raise self._shapes(self.keys.keys[module], factors, before)
            self._put(before, None, ScaledTensor(before, factors, by_row=True))

    def _add_bias(self, module: str, change: TensorSource, scaling: float) -> None:
        bias, _ = self._place(f"{module}.bias")
        if not bias:
            raise self._misfit(f"the adapter adds a bias to {module}, which has none in the base")
        before = self.tensors[bias]
        if before.shape != change.shape:
            raise self._shapes(f"the bias of {self.keys.keys[module]}", change, before)
        self._put(before, None, AddedVector(before, change, scaling))

    def _place(self, name: str) -> tuple[str | None, str | None]:
        """The stored name of a parameter, or the alias that it is, or neither."""
        there = self.names.find(name)
        if there in self.tensors:
            return there, None
        alias = there or self.names.new(name)
        return None, alias if alias in self.ties.of else None

    def _target(self, name: str, module: str) -> tuple[TensorSource, str | None]:
        """The tensor that a module's change goes into, as it is so far, and its alias if it is one."""
        there, alias = self._place(name)
        if not (there or alias):
            raise self._misfit(f"{self.keys.keys[module]} changes {name}, which the base does not have")
        source = self.tensors[there] if there else self.ties.before(str(alias))
        if not source.dtype.is_floating_point:
            what = f"the adapter changes {source.name}, whose dtype is {source.dtype}"
            fix = "use the version of the base from before quantisation"
            raise UserError("RG109", what, where=str(self.path), fix=fix)
        return source, alias

    def _put(self, old: TensorSource, alias: str | None, new: TensorSource) -> None:
        if alias:
            self.ties.give(alias, new)
        else:
            self.tensors[old.name] = new
            self.changed.add(old.name)

    def _check_complete(self) -> None:
        """Refuse a file that lacks modules which the config adapts in other layers."""
        if any(self.config.values.get(key) for key in ("layers_to_transform", "exclude_modules")):
            return
        patterns = {_numbered(module) for module in self.keys.modules}
        entries = {self.config.targets(module) for module in self.keys.modules} - {""}
        have = {self.names.find(f"{module}.weight") for module in self.keys.modules}
        for name, source in self.base.tensors.items():
            module = name.removesuffix(".weight")
            entry = self.config.targets(module) if name.endswith(".weight") and len(source.shape) > 1 else ""
            if not entry or name in have:
                continue
            original = self.names.strip + module.removeprefix(self.names.add)
            if entry not in entries or _numbered(module) in patterns or _numbered(original) in patterns:
                what = f"target_modules names {entry!r}, and the file has nothing for {module}"
                raise self._misfit(what, "the file is incomplete: download or save it again")

    def _factors(self, module: str, old: TensorSource, down: TensorSource, up: TensorSource) -> UserError:
        what = f"{module}: A {down.shape} and B {up.shape} do not make the base's {old.name} of shape {old.shape}"
        return self._misfit(what, "apply it to the model that it was trained on")

    def _shapes(self, key: str, new: TensorSource, old: TensorSource) -> UserError:
        what = f"{key} has shape {new.shape}, and the base's {old.name} has {old.shape}"
        return self._misfit(what, "apply it to the model that it was trained on")

    def _misfit(self, what: str, fix: str = "apply it to the model that it was trained on") -> UserError:
        return UserError("RG108", what, where=str(self.path), fix=fix)


def _common(one: str, other: str) -> list[str]:
    """Leading parts that two dotted names share."""
    shared = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return shared


def _numbered(module: str) -> str:
    """A module's name with every layer number replaced."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", module)
