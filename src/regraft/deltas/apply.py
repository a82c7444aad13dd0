"""From a base and a delta back to a model that from_pretrained loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint import Checkpoint, ModelWriter, TensorSource, TensorSpec
from regraft.checkpoint.licences import short_name
from regraft.checkpoint.lineage import InputRecord, Lineage, Output
from regraft.checkpoint.model import open_shell
from regraft.checkpoint.paths import inside
from regraft.checkpoint.sidecars import copy_licences, copy_sidecars
from regraft.checkpoint.weights import folder_weights
from regraft.checkpoint.writer import size_on_disk
from regraft.deltas.card import write_model_card
from regraft.deltas.encoding import Parts, arithmetic, restored, slices, whole
from regraft.deltas.record import FILES, Delta, TensorRecord, main_dtype
from regraft.deltas.sketch import distance_to_own
from regraft.deltas.work import Work, check_output, each
from regraft.errors import UserError


@dataclass(frozen=True)
class OpenDelta:
    """A delta on disk, its headers read: the record, and what is stored by part and tensor."""

    path: Path
    record: Delta
    parts: Parts

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return size_on_disk([TensorSpec(name, part.shape, part.dtype) for name, part in self.parts.items()])


def open_delta(path: Path) -> OpenDelta:
    """Open a folder that `extract` made.

    Raises:
        UserError: RG101, RG105 if it is no delta, RG102 to RG106 for its files.
    """
    if not path.is_dir():
        raise UserError("RG101", "there is no such folder", where=str(path), fix="name a folder that holds a delta")
    return OpenDelta(path, Delta.read(path), folder_weights(path).tensors)


def apply(
    delta: OpenDelta,
    base: Checkpoint,
    out: Path,
    *,
    scale: float = 1.0,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Lineage:
    """Write base + scale x delta into the folder `out`.

    Args:
        scale: what the differences are multiplied by; tensors that are stored whole are not.
        force: replace an output that exists, and go on with a base that is not the delta's own, if the shapes agree.
        on_progress: called with (elements done, elements in all).

    Raises:
        UserError: RG211 for another base unless `force`, RG201 and RG202 for one that does not fit, RG112 for a damaged
            delta, RG206 for sums that are not finite, RG401 to RG405 for the output.
    """
    check_output(out, [delta.path, base.path], force=force)
    record = delta.record
    sources = {name: _source(delta, base, name, one) for name, one in record.tensors.items()}
    digest = base.full_digest()
    remarks = [] if digest == record.base.digest else [_other_base(delta, base, force)]
    specs = [TensorSpec(name, tuple(one.shape), one.torch_dtype) for name, one in record.tensors.items()]
    inputs = [InputRecord.of(base, short_name(base), role="base", digest=digest, digest_kind="content")]
    settings: dict[str, Any] = {"scale": scale, "kind": record.kind, "model": record.model.model_dump(mode="json")}
    lineage = Lineage(kind="delta", method="delta", inputs=inputs, settings=settings, warnings=remarks)
    with ModelWriter(out, specs, force=force) as writer:
        work = Work(sum(spec.numel for spec in specs), on_progress)
        each(partial(_restore, delta, sources, scale, writer, work), specs)
        dtype = main_dtype({spec.name: (spec.dtype, spec.numel) for spec in specs})
        _write_files(writer.staging, delta, base, dtype)
        lineage.output = Output(
            tensors=len(specs),
            parameters=sum(spec.numel for spec in specs if spec.dtype.is_floating_point),
            bytes=size_on_disk(specs),
            dtype=str(dtype).removeprefix("torch."),
        )
        lineage.licence = record.licence
        lineage.finish()
        lineage.write(writer.staging)
        write_model_card(writer.staging, record, base, scale, remarks, name=writer.out.name)
        writer.publish()
    return lineage


def _source(delta: OpenDelta, base: Checkpoint, name: str, record: TensorRecord) -> TensorSource:
    """The tensor that a change is added to; the stored one if it is whole."""
    shape = tuple(record.shape)
    if record.encoding == "whole":
        return whole(delta.parts, name, shape, record.torch_dtype)
    if name not in base.tensors and name not in base.aliases:
        what = f"the base has no tensor {name}"
        raise UserError("RG202", what, where=base.ref, fix=f"the delta belongs to {delta.record.base.name}")
    source = base.source(name)
    if source.shape != shape:
        what = f"{name} has shape {list(source.shape)} in the base and {list(shape)} in the delta"
        raise UserError("RG201", what, where=base.ref, fix=f"the delta belongs to {delta.record.base.name}")
    floats = source.dtype.is_floating_point and record.torch_dtype.is_floating_point
    if source.dtype != record.torch_dtype if record.encoding == "base" else not floats:
        what = f"{name} is {source.dtype} in the base and {record.torch_dtype} in the delta"
        raise UserError("RG211", what, where=base.ref, fix=f"the delta belongs to {delta.record.base.name}")
    return source


def _other_base(delta: OpenDelta, base: Checkpoint, force: bool) -> str:
    """A remark on a base that is not the delta's own; raises RG211 unless `force`."""
    distance = distance_to_own(delta.parts, base).sentence()
    what = f"this is not the base that the delta was made from ({delta.record.base.name}); to it, it is {distance}"
    if not force:
        fix = "name that base, or add --force to add the delta to this one"
        raise UserError("RG211", what, where=base.ref, fix=fix)
    return what


def _write_files(staging: Path, delta: OpenDelta, base: Checkpoint, dtype: torch.dtype) -> None:
    """Config, tokenizer and the like: the base's where they are the fine-tune's too, then those of the delta."""
    kept = {name: path for name, path in base.files.items() if name in delta.record.base_files}
    folder = inside(delta.path, FILES, where=delta.path)
    own = [open_shell(str(delta.path), folder)] if folder.is_dir() else []
    for one in (dataclasses.replace(base, files=kept), *own):
        copy_sidecars(staging, config_from=one, tokenizer_from=one, config_changes={}, dtype=dtype)
    copy_licences(staging, [open_shell(str(delta.path), delta.path)])


def _restore(
    delta: OpenDelta,
    sources: Mapping[str, TensorSource],
    scale: float,
    writer: ModelWriter,
    work: Work,
    spec: TensorSpec,
) -> None:
    """Write one tensor of the result."""
    source, encoding = sources[spec.name], delta.record.tensors[spec.name].encoding
    values: Iterator[tuple[int, torch.Tensor]]
    if encoding in ("base", "whole"):
        values = ((start, source.read(start, stop)) for start, stop in slices(spec.numel))
    else:
        values = restored(delta.parts, spec.name, spec.shape, spec.dtype, encoding, source, scale)
    for start, piece in values:
        if encoding not in ("base", "whole") and not bool(torch.isfinite(piece.to(arithmetic(piece.dtype))).all()):
            what = f"{spec.name} would hold values that are not finite"
            raise UserError("RG206", what, where=f"scale {scale:g}", fix="repair the base, or lower --scale")
        writer.write(spec.name, start, piece)
        work.advance(piece.numel())
