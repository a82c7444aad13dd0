"""Which files of a folder hold the model, and what is in them.

The order is that of `from_pretrained`, so that regraft reads what users run: the file that config.json names as
`transformers_weights`, model.safetensors, its index, pytorch_model.bin, its index; the first that is there is taken
and the others are a remark. An index is foreign text:
every file name in it is checked before it is opened, and every tensor must be where the index says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.paths import WEIGHT_SUFFIXES, head, inside, shown
from regraft.checkpoint.pickle_file import read_pickle
from regraft.checkpoint.safetensors_file import read_safetensors
from regraft.checkpoint.tensor import TensorSource
from regraft.errors import UserError

CANDIDATES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_CONFIG = "adapter_config.json"
DELTA_RECORD = "delta.json"
_OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".npz", ".ot", ".tflite")
# Config keys that say that the stored values are codes, and the names of the tensors that go with codes.
_QUANTISED_KEYS = ("quantization_config", "quantization", "compression_config")
_QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|scb|absmax|nested_absmax|quant_map|quant_state\..+|weight_packed|weight_scale_inv|weight_format)$"
    r"|\._packed_params$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Weights:
    """What the weight files of one model hold; `files` are those read, beginning with the index if there is one."""

    tensors: Mapping[str, TensorSource]
    aliases: Mapping[str, str]
    files: tuple[Path, ...]
    remarks: tuple[str, ...] = ()


def is_weight_file(name: str) -> bool:
    """Whether a file name is that of weights in any format, or of an index of such files."""
    return name.endswith((*WEIGHT_SUFFIXES, *_OTHER_WEIGHTS, ".safetensors.index.json", ".bin.index.json"))


def folder_weights(folder: Path, named: str = "") -> Weights:
    """The weights in a model's folder; headers only are read, except from pickles of the old format.

    Args:
        folder: the model's folder.
        named: the file that the model's config wants to be read, if it wants one.

    Raises:
        UserError: RG102 (none, or shards missing), RG103 and RG111 (damaged), RG104 (a name or link that leaves the
            folder), RG105 (index unreadable), RG106 (git-LFS stub), RG107 (pickle with code), RG108 (the folder is an
            adapter), RG109 (formats that cannot be merged).
    """
    found = [name for name in CANDIDATES if (folder / name).is_symlink() or (folder / name).exists()]
    if named:
        found = [named, *(name for name in found if name != named)]
    if not found:
        raise _nothing(folder)
    first, *others = found
    remarks = [f"{first} was read; {', '.join(others)} in the same folder was not"] if others else []
    if (folder / ADAPTER_CONFIG).exists():
        remarks.append(f"{ADAPTER_CONFIG} in the folder was not applied")
    path = inside(folder, first, where=folder)
    if not path.is_file():
        fix = "download the model again, or name another folder"
        raise UserError("RG102", f"{shown(first)} is missing, or no file", where=str(folder), fix=fix)
    weights = _sharded(folder, path) if first.endswith(".json") else file_weights(path)
    return Weights(weights.tensors, weights.aliases, weights.files, (*remarks, *weights.remarks))


def file_weights(path: Path) -> Weights:
    """The weights in one file; which format it has is decided by its name.

    Raises:
        UserError: RG101, RG103, RG106, RG107, RG109, RG111 as above; RG102 if the name is not that of a weight file.
    """
    if path.suffix == ".safetensors":
        return _split(read_safetensors(path)[0], path)
    if path.suffix in WEIGHT_SUFFIXES:
        return _split(read_pickle(path), path)
    if path.suffix == ".gguf" or head(path, 4) == b"GGUF":
        fix = "use the model that it was converted from, as safetensors"
        raise UserError("RG109", "GGUF files hold packed weights", where=str(path), fix=fix)
    fix = f"name a folder, or a file that ends in {', '.join(WEIGHT_SUFFIXES)}"
    raise UserError("RG102", f"{path.name} is no weight file", where=str(path), fix=fix)


def is_delta(folder: Path) -> bool:
    """Whether a folder holds a delta rather than a model or an adapter."""
    return (folder / DELTA_RECORD).is_file() and not (
        (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists()
    )


def refuse_delta(folder: Path) -> None:
    """Raise RG113 if a folder holds a delta, whose weights are those of no model."""
    if is_delta(folder):
        base = read_json(inside(folder, DELTA_RECORD, where=folder)).get("base")
        named = base.get("repo_id") if isinstance(base, dict) else None
        named = named if isinstance(named, str) and 0 < len(named) < 100 and named.isprintable() else "BASE"
        fix = f"write {named}+{folder}, or name it beside its base"
        raise UserError("RG113", "this folder is a delta, not a model", where=str(folder), fix=f"{fix} in a merge")


def refuse_quantised(config: Mapping[str, Any], names: Iterable[str], where: Path) -> None:
    """Raise RG109 if the config or the tensors' names say that the weights are codes of a quantisation."""
    fix = "use the version of the model from before quantisation"
    for key in _QUANTISED_KEYS:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part.get(key):
                given = part[key]
                method = given.get("quant_method", "") if isinstance(given, dict) else ""
                named = f"{key}: {shown(method)}" if method else key
                raise UserError(
                    "RG109", f"the weights are quantised ({named} in config.json)", where=str(where), fix=fix
                )
    for name in names:
        if _QUANTISED_NAMES.search(name):
            raise UserError("RG109", f"the weights are quantised (tensor {shown(name)})", where=str(where), fix=fix)


def _split(sources: dict[str, TensorSource], path: Path) -> Weights:
    """Names that share a source become aliases of the first of them."""
    tensors = {name: source for name, source in sources.items() if source.name == name}
    aliases = {name: source.name for name, source in sources.items() if source.name != name}
    return Weights(tensors, aliases, (path,))


def _sharded(folder: Path, index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        fix = "download the index again"
        raise UserError("RG105", "the index has no weight_map of tensor to file", where=str(index), fix=fix)
    names = sorted(set(weight_map.values()))
    if not names:
        raise UserError("RG102", "the index lists no tensors", where=str(index), fix="download the model again")
    paths = {name: inside(folder, name, where=index) for name in names}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        what = f"{len(missing)} of {len(names)} files that the index names are missing: {listed(missing)}"
        raise UserError("RG102", what, where=str(index), fix="download them into the folder")
    suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
    tensors: dict[str, TensorSource] = {}
    aliases: dict[str, str] = {}
    unlisted: list[str] = []
    listed_in: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        listed_in.setdefault(file, []).append(tensor)
    for name, path in paths.items():
        if path.suffix != suffix:
            fix = "repair the index"
            raise UserError("RG105", f"the index names {shown(name)}, no {suffix} file", where=str(index), fix=fix)
        shard = file_weights(path)
        here = {*shard.tensors, *shard.aliases}
        lost = [tensor for tensor in listed_in[name] if tensor not in here]
        if lost:
            what = f"the index says that {shown(name)} holds {listed(lost)}, which it does not"
            raise UserError("RG103", what, where=str(index), fix="download the index and the shards again")
        twice = here & {*tensors, *aliases}
        if twice:
            what = f"{listed(sorted(twice))} is in {shown(name)} and in another shard"
            raise UserError("RG103", what, where=str(index), fix="download the index and the shards again")
        unlisted += [tensor for tensor in sorted(here) if tensor not in weight_map]
        tensors |= shard.tensors
        aliases |= shard.aliases
    remarks = (f"the index does not list {listed(unlisted)}, which was read all the same",) if unlisted else ()
    return Weights(tensors, aliases, (index, *paths.values()), remarks)


def _nothing(folder: Path) -> UserError:
    """The error for a folder without weights under a usual name, which says what is there instead."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(inside(folder, ADAPTER_CONFIG, where=folder)).get("base_model_name_or_path")
        named = base if isinstance(base, str) and base else "BASE"
        fix = f"apply it to its base by writing {named}+{folder}"
        return UserError("RG108", "this folder is an adapter, not a model", where=str(folder), fix=fix)
    there = sorted(path.name for path in folder.iterdir() if is_weight_file(path.name))
    if there and all(name.endswith(".gguf") for name in there):
        fix = "use the model that it was converted from, as safetensors"
        return UserError("RG109", f"{listed(there)} holds packed weights", where=str(folder), fix=fix)
    own = [name for name in there if name.endswith(WEIGHT_SUFFIXES)]
    if any(re.search(r"-\d{5}-of-\d{5}\.", name) for name in own):
        fix = "download model.safetensors.index.json (or pytorch_model.bin.index.json) into the folder"
        return UserError("RG102", f"there are shards ({listed(own)}) but no index", where=str(folder), fix=fix)
    if own:
        what = f"no {' or '.join(CANDIDATES[::2])} in the folder, but {listed(own)}"
        return UserError("RG102", what, where=str(folder), fix=f"name the file itself, as in {folder / own[0]}")
    if there:
        fix = "convert them to safetensors first"
        return UserError("RG102", f"{listed(there)} has a format that is not read", where=str(folder), fix=fix)
    below = sorted(path.parent.name for name in CANDIDATES for path in folder.glob(f"*/{name}"))
    fix = f"did you mean {str(folder / below[0])!r}?" if below else "name the folder that holds model.safetensors"
    return UserError("RG102", "there are no weights in the folder", where=str(folder), fix=fix)


def listed(names: list[str], most: int = 6) -> str:
    """Names for a sentence, the first few of them."""
    text = ", ".join(json.dumps(name, ensure_ascii=True).strip('"')[:120] for name in names[:most])
    return text + (f" and {len(names) - most} more" if len(names) > most else "")
