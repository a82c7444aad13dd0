"""A checkpoint: the tensors, config and other files of one model, opened without reading the weights.

Opening costs headers, whatever the size of the model, and runs no code of the model's. What is unusual but harmless is
kept as a remark; what would make a wrong result is an error. `digest` names the content for caches at the price of a
few small reads per tensor, `full_digest` by reading everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from regraft.checkpoint.dtypes import is_float, item_size, torch_name
from regraft.checkpoint.json_file import read_json
from regraft.checkpoint.paths import (
    Ref,
    exists,
    inside,
    located,
    looks_like_path,
    near,
    not_found,
    parse_ref,
    shown,
)
from regraft.checkpoint.tensor import TensorSource, nbytes, numel, read_array, stored_dtype
from regraft.checkpoint.weights import (
    Weights,
    file_weights,
    folder_weights,
    is_delta,
    is_weight_file,
    refuse_delta,
    refuse_quantised,
)
from regraft.errors import UserError

__all__ = ["Checkpoint", "Ref", "open_checkpoint", "open_local", "parse_ref"]

_SAMPLE_BYTES = 4096
_EDGE_BYTES = 64
_PIECE = 1 << 24
_TEMPLATES = "additional_chat_templates"
# What is told about a model may be added to, for example by scores, without its being another model.
_TOLD = ("README.md", "regraft.json")


@dataclass(frozen=True, eq=False)
class AppliedDelta:
    """A delta that a checkpoint includes.

    Attributes:
        ref: as the user wrote it.
        digest: SHA-256 of its record, which holds the digests of base and fine-tune.
        base: what it was put on.
        own: the content digest of the base that it was made from.
        remark: how far `base` is from that one, as far as looked at; "" if they are the same.
    """

    ref: str
    digest: str
    base: Checkpoint
    own: str
    remark: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One model on disk; made by `open_checkpoint`.

    Attributes:
        ref: the reference as the user wrote it.
        path: the folder that holds the model (for a single file: the folder of the file).
        tensors: one entry per stored tensor, in file order.
        aliases: other name -> name in `tensors`, for tensors that share storage in a pickled file.
        config: config.json, {} if there is none.
        files: the other files by name relative to `path` (no weights, no config.json).
        repo_id, revision: Hub id and commit hash, where the model comes from the Hub.
        adapters: references of the adapters and deltas that `tensors` include; from the Hub with their commit hash.
        folders: where these are.
        deltas: those of them that are deltas.
        remarks: sentences on what is unusual about the folder.
        stamps: a text per file (name, size, time of change) that enters `digest`.
    """

    ref: str
    path: Path
    tensors: Mapping[str, TensorSource] = field(repr=False)
    aliases: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    files: Mapping[str, Path] = field(default_factory=dict, repr=False)
    repo_id: str = ""
    revision: str = ""
    adapters: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    stamps: tuple[str, ...] = field(default=(), repr=False)
    folders: tuple[Path, ...] = ()
    deltas: tuple[AppliedDelta, ...] = field(default=(), repr=False)

    @property
    def model_type(self) -> str:
        """`model_type` of the config, such as "llama"; "" if it is not given."""
        return str(self.config.get("model_type") or "")

    @property
    def architectures(self) -> tuple[str, ...]:
        """Class names in the config, such as ("LlamaForCausalLM",)."""
        return tuple(self.config.get("architectures") or ())

    @property
    def bytes(self) -> int:
        """Size of all stored tensors."""
        return sum(map(nbytes, self.tensors.values()))

    @property
    def parameters(self) -> int:
        """Elements of all stored floating-point tensors; tied ones count once, integer buffers do not."""
        return sum(numel(t) for t in self.tensors.values() if is_float(stored_dtype(t)))

    def source(self, name: str) -> TensorSource:
        """The tensor of this name or alias; KeyError if there is none."""
        return self.tensors[self.aliases.get(name, name)]

    def same_bytes(self, one: str, other: str) -> bool:
        """Whether two tensors (names or aliases) agree in dtype, shape and every bit; stops at the first difference."""
        a, b = self.source(one), self.source(other)
        if a is b:
            return True
        if (a.shape, stored_dtype(a)) != (b.shape, stored_dtype(b)):
            return False
        return all(np.array_equal(x, y) for x, y in zip(_pieces(a), _pieces(b), strict=True))

    def digest(self) -> str:
        """A key for caches, 64 hexadecimal digits, for a few small reads per tensor.

        It changes with names, shapes, dtypes, config, the size and time of any file, and with the values sampled: the
        first and the last bytes of every tensor and a block of 4 KiB at a place that depends on its name.

        Raises:
            UserError: RG101 or RG103 if a file has gone or changed.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(_canonical(["regraft-digest-1", self.config, self.aliases, self.adapters, self.stamps]))
        for name, source in self.tensors.items():
            sha.update(_title(name, source))
            count, size = numel(source), item_size(stored_dtype(source))
            block, edge = _SAMPLE_BYTES // size, _EDGE_BYTES // size
            place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % max(count - block, 1)
            for start, stop in ((0, edge), (place, place + block), (max(count - edge, 0), count)):
                sha.update(read_array(source, start, min(stop, count)).view(np.uint8).data)
        return sha.hexdigest()

    def full_digest(self) -> str:
        """SHA-256 of the config and of all tensors (name, dtype, shape, bytes) in the order of their names.

        It depends on the content alone: not on the file format, the shards, paths or times. Reads everything.

        Raises:
            UserError: RG101 or RG103 if a file has gone or changed.
        """
        sha = hashlib.sha256(_canonical(["regraft-full-1", self.config, self.aliases]))
        for name in sorted(self.tensors):
            sha.update(_title(name, self.tensors[name]))
            for piece in _pieces(self.tensors[name]):
                sha.update(piece.data)
        return sha.hexdigest()


def open_checkpoint(
    ref: str, *, relative_to: Path | None = None, offline: bool = False, force: bool = False
) -> Checkpoint:
    """Open a model: a folder, a file, or a Hub id, with adapters and deltas applied.

    Args:
        ref: `path`, `org/name`, `org/name@revision`, each followed by any number of `+adapter` and `+delta`; see
            `parse_ref`.
        relative_to: folder that relative paths are below (default: the current one).
        offline: use nothing but the local cache of the Hub.
        force: put deltas on bases that are not theirs, with a remark that says how far they are.

    Raises:
        UserError: RG101 to RG113 for what is on disk, RG201, RG202 and RG211 for a delta that does not fit, RG501 to
            RG503 for the Hub; nothing has been written then.
    """
    parsed = parse_ref(ref, relative_to=relative_to)
    path, commit = _fetched(parsed, relative_to, offline)
    checkpoint = dataclasses.replace(open_local(path), ref=ref, repo_id=parsed.model if commit else "", revision=commit)
    for adapter in parsed.adapters:
        folder, commit = _fetched(adapter, relative_to, offline)
        name = str(Ref(adapter.model, commit or adapter.revision))
        if is_delta(folder):
            from regraft.checkpoint.delta import open_delta

            checkpoint = open_delta(folder).on(checkpoint, name, force=force)
        else:
            from regraft.checkpoint.adapter import apply

            checkpoint = apply(checkpoint, folder, name)
    return checkpoint


def open_shell(ref: str, folder: Path, remark: str = "") -> Checkpoint:
    """A folder without its weights, for telling what else is in it.

    Raises:
        UserError: RG104 or RG105 for its other files.
    """
    files, remarks = _other_files(folder)
    told = (remark, *remarks) if remark else tuple(remarks)
    return Checkpoint(ref, folder, {}, {}, _config(folder), files, remarks=told)


def open_local(path: Path) -> Checkpoint:
    """Open a folder or a single file that exists; `ref` is the path.

    A single file takes config.json from its folder, and the other files only if that is there: a folder without
    it may hold anything.

    Raises:
        UserError: RG102 to RG113.
    """
    single = not path.is_dir()
    folder = path.parent if single else path
    try:
        refuse_delta(folder)
        config = _config(folder)
        weights = file_weights(path) if single else folder_weights(path, config.get("transformers_weights") or "")
        files, remarks = _other_files(folder) if config or not single else ({}, [])
    except PermissionError as error:
        what = f"the folder cannot be read: {error.strerror}"
        raise UserError("RG101", what, where=str(folder), fix="check its permissions") from None
    refuse_quantised(config, [*weights.tensors, *weights.aliases], path)
    if not weights.tensors:
        raise UserError("RG102", "the weight files hold no tensors", where=str(path), fix="name another model")
    return Checkpoint(
        ref=str(path),
        path=folder,
        tensors=weights.tensors,
        aliases=weights.aliases,
        config=config,
        files=files,
        remarks=(*weights.remarks, *remarks, *_code(config, files)),
        stamps=_stamps(folder, weights, files),
    )


def _fetched(ref: Ref, relative_to: Path | None, offline: bool) -> tuple[Path, str]:
    """The local path of a reference, and the commit hash if it came from the Hub."""
    path = located(ref.model, relative_to)
    if exists(ref.model, relative_to):
        if ref.revision:
            what = f"{ref.model!r} is a local path, which has no revision {ref.revision!r}"
            raise UserError("RG101", what, where=str(ref), fix="leave out the @ and what follows it")
        return path, ""
    if "://" in ref.model:
        fix = "write the id of the model, such as org/name, or a path"
        raise UserError("RG101", "an address is no reference to a model", where=ref.model, fix=fix)
    if looks_like_path(ref.model):
        raise not_found(ref.model, path)
    from regraft.checkpoint.hub import fetch

    try:
        return fetch(ref.model, ref.revision, offline=offline)
    except UserError as error:
        hint = near(path) or f"if a folder is meant, there is none called {ref.model!r} here"
        raise UserError(error.code, error.what, where=error.where, fix=f"{error.fix}; {hint}") from None


def _config(folder: Path) -> dict[str, Any]:
    path = inside(folder, "config.json", where=folder)
    if not (path.is_symlink() or path.exists()):
        return {}
    config: dict[str, Any] = read_json(path)
    classes = config.get("architectures")
    fix = "restore the file from where the model came from"
    for key in ("model_type", "transformers_weights"):
        if not isinstance(config.get(key), (str, type(None))):
            raise UserError("RG105", f"{key} is {shown(config[key])} and not a text", where=str(path), fix=fix)
    if not (classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))):
        raise UserError("RG105", f"architectures is {shown(classes)} and not a list of texts", where=str(path), fix=fix)
    return config


def _other_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files beside weights and config, and remarks on links that lead nowhere."""
    files: dict[str, Path] = {}
    remarks = []
    names = sorted(entry.name for entry in os.scandir(folder))
    if (folder / _TEMPLATES).is_dir():
        inside(folder, _TEMPLATES, where=folder)
        names += sorted(f"{_TEMPLATES}/{entry.name}" for entry in os.scandir(folder / _TEMPLATES))
    for name in names:
        if name.startswith(".") or name == "config.json" or is_weight_file(name) or (folder / name).is_dir():
            continue
        if not _is_text(name):
            remarks.append(f"{shown(name)} has a name that is no text in UTF-8, and was left out")
            continue
        path = inside(folder, name, where=folder)
        if path.is_file():
            files[name] = path
        else:
            remarks.append(f"{name} is a link to nothing or no regular file, and was left out")
    return files, remarks


def _is_text(name: str) -> bool:
    """Whether a name can be written into a card or a JSON file."""
    return name.encode(errors="ignore").decode() == name


def _code(config: Mapping[str, Any], files: Mapping[str, Path]) -> list[str]:
    """A remark where the model brings code of its own, which is never run by opening it."""
    code = [name for name in files if name.endswith(".py")]
    if config.get("auto_map"):
        files_named = ", ".join(code) or "not in the folder"
        return [f"config.json asks for code of the model's own ({files_named}), which was not run"]
    return [f"{', '.join(code)} is in the folder and was not run"] if code else []


def _stamps(folder: Path, weights: Weights, files: Mapping[str, Path]) -> tuple[str, ...]:
    stamps = []
    for path in (*weights.files, *(p for name, p in files.items() if name not in _TOLD)):
        status = path.stat()
        name = path.relative_to(folder).as_posix()
        stamps.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return tuple(stamps)


def _pieces(source: TensorSource) -> Iterator[np.ndarray]:
    """The bytes of a tensor in slices of 16 MiB, each a uint8 array."""
    step = _PIECE // item_size(stored_dtype(source))
    for start in range(0, numel(source), step):
        yield read_array(source, start, start + step).view(np.uint8)


def _title(name: str, source: TensorSource) -> bytes:
    return _canonical([name, f"torch.{torch_name(stored_dtype(source))}", list(source.shape)])


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
