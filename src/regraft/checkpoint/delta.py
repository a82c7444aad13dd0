"""A delta on disk, and a checkpoint with one applied: `base+delta`, as `model+adapter` is.

A delta belongs to one base. Opening looks at the values of the base that the delta carries, which costs a few small
reads and tells any other base; `check_bases` reads the whole base and compares it with the digest in the delta, before
work starts that depends on it. Whoever wants a delta on another base says so, and is told how far that base is.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from regraft.checkpoint.delta_record import FILES, Delta, TensorRecord, content_digest
from regraft.checkpoint.delta_sketch import distance_to_own, is_own
from regraft.checkpoint.delta_tensor import DeltaTensor, Parts, whole
from regraft.checkpoint.dtypes import main_dtype, torch_name
from regraft.checkpoint.lora import Renamed
from regraft.checkpoint.model import AppliedDelta, Checkpoint, open_shell
from regraft.checkpoint.paths import inside
from regraft.checkpoint.shards import TensorSpec, size_on_disk
from regraft.checkpoint.sidecars import changed_config
from regraft.checkpoint.tensor import TensorSource, numel, stored_dtype
from regraft.checkpoint.weights import DELTA_RECORD, folder_weights
from regraft.errors import UserError


@dataclass(frozen=True, eq=False)
class OpenDelta:
    """A delta on disk, its headers read.

    Attributes:
        path: its folder.
        record: what delta.json says.
        parts: what is stored, by part and tensor.
        digest: SHA-256 of delta.json.
        stamps: a text per file, as those of checkpoints; that of delta.json has the digest instead of the time.
    """

    path: Path
    record: Delta
    parts: Parts
    digest: str
    stamps: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return size_on_disk([TensorSpec(name, part.shape, stored_dtype(part)) for name, part in self.parts.items()])

    def on(self, base: Checkpoint, ref: str, *, scale: float = 1.0, force: bool = False) -> Checkpoint:
        """The base with the delta applied: the fine-tune, or an approximation of it.

        Args:
            ref: the delta as the user wrote it.
            scale: what differences are multiplied by; tensors that are stored whole are not.
            force: go on, with a remark, with a base that is not the delta's own, if the shapes agree.

        Raises:
            UserError: RG211 for another base unless `force`, RG201 and RG202 for one that does not fit, RG112 for a
                damaged delta, RG104 and RG105 for its other files.
        """
        record = self.record
        tensors = {name: self._source(base, name, one, scale) for name, one in record.tensors.items()}
        remark = "" if is_own(self.parts, base) else self._told(base)
        if remark and not force:
            raise _other_base(remark, base)
        folder = inside(self.path, FILES, where=self.path)
        own = open_shell(str(self.path), folder) if folder.is_dir() else None
        beside = {n: p for n, p in open_shell(str(self.path), self.path).files.items() if n != DELTA_RECORD}
        dtype = torch_name(main_dtype((stored_dtype(source), numel(source)) for source in tensors.values()))
        return dataclasses.replace(
            base,
            tensors=tensors,
            aliases={},
            config=own.config if own is not None and own.config else changed_config(base.config, {}, dtype),
            files={n: p for n, p in base.files.items() if n in record.base_files}
            | beside
            | (dict(own.files) if own is not None else {}),
            adapters=(*base.adapters, ref),
            folders=(*base.folders, self.path),
            deltas=(*base.deltas, AppliedDelta(ref, self.digest, base, record.base.digest, remark)),
            remarks=(*base.remarks, *([remark] if remark else [])),
            stamps=(*base.stamps, *self.stamps),
        )

    def _source(self, base: Checkpoint, name: str, record: TensorRecord, scale: float) -> TensorSource:
        """One tensor of the result."""
        shape = tuple(record.shape)
        if record.encoding == "whole":
            return Renamed(whole(self.parts, name, shape, record.torch_dtype), name)
        if name not in base.tensors and name not in base.aliases:
            raise self._misfit("RG202", f"the base has no tensor {name}", base)
        source = base.source(name)
        if source.shape != shape:
            what = f"{name} has shape {list(source.shape)} in the base and {list(shape)} in the delta"
            raise self._misfit("RG201", what, base)
        floats = source.dtype.is_floating_point and record.torch_dtype.is_floating_point
        if source.dtype != record.torch_dtype if record.encoding == "base" else not floats:
            what = f"{name} is {source.dtype} in the base and {record.torch_dtype} in the delta"
            raise self._misfit("RG211", what, base)
        if record.encoding == "base":
            return source if source.name == name else Renamed(source, name)
        return DeltaTensor(source, self.parts, name, record.torch_dtype, record.encoding, scale)

    def _misfit(self, code: str, what: str, base: Checkpoint) -> UserError:
        return UserError(code, what, where=base.ref, fix=f"the delta belongs to {self.record.base.name}")

    def _told(self, base: Checkpoint) -> str:
        distance = distance_to_own(self.parts, base).sentence()
        return f"this is not the base that the delta was made from ({self.record.base.name}); to it, it is {distance}"


def open_delta(path: Path) -> OpenDelta:
    """Open a folder that `regraft delta extract` made.

    Raises:
        UserError: RG101, RG105 if it is no delta, RG102 to RG106 for its files.
    """
    if not path.is_dir():
        raise UserError("RG101", "there is no such folder", where=str(path), fix="name a folder that holds a delta")
    record = Delta.read(path)
    weights = folder_weights(path)
    content = (path / DELTA_RECORD).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    beside = path / FILES
    files = [*weights.files, *(sorted(beside.rglob("*")) if beside.is_dir() else [])]
    states = [(file.relative_to(path).as_posix(), file.stat()) for file in files if file.is_file()]
    stamps = [f"+{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
    return OpenDelta(path, record, weights.tensors, digest, (f"+{DELTA_RECORD} {len(content)} {digest}", *stamps))


def check_bases(checkpoints: Iterable[Checkpoint], *, force: bool = False) -> list[str]:
    """Compare the bases of all applied deltas with the digests that these carry; reads each base whole.

    Returns:
        Remarks on bases that are others.

    Raises:
        UserError: RG211 for another base, unless `force`.
    """
    remarks = []
    for delta in dict.fromkeys(delta for checkpoint in checkpoints for delta in checkpoint.deltas):
        remark = delta.remark
        if not remark and content_digest(delta.base) != delta.own:
            remark = f"the base is not the one that {delta.ref} was made from, although all values sampled are equal"
            if not force:
                raise _other_base(remark, delta.base)
        if remark:
            remarks.append(remark)
    return remarks


def _other_base(remark: str, base: Checkpoint) -> UserError:
    fix = "name that base, or add --force to add the delta to this one"
    return UserError("RG211", remark, where=base.ref, fix=fix)
