"""From a base and a delta back to a model that from_pretrained loads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint import Checkpoint, ModelWriter, TensorSource, TensorSpec, numel
from regraft.checkpoint.delta import OpenDelta, check_bases, open_delta
from regraft.checkpoint.delta_record import content_digest
from regraft.checkpoint.delta_tensor import DeltaTensor, arithmetic, slices
from regraft.checkpoint.dtypes import is_float, main_dtype, torch_name
from regraft.checkpoint.licences import short_name
from regraft.checkpoint.lineage import InputRecord, Lineage, Output
from regraft.checkpoint.sidecars import copy_licences, copy_sidecars
from regraft.checkpoint.surroundings import done_before, run_key, surroundings
from regraft.checkpoint.tensor import stored_dtype
from regraft.checkpoint.writer import size_on_disk
from regraft.deltas.card import write_model_card
from regraft.deltas.work import Work, check_output, each
from regraft.errors import UserError, UserWarningMessage

__all__ = ["OpenDelta", "apply", "open_delta"]


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

    The same call goes on with the tensors that an unfinished one has written, and does nothing after a finished one.

    Args:
        scale: what the differences are multiplied by; tensors that are stored whole are not.
        force: replace an output that exists, and go on with a base that is not the delta's own, if the shapes agree.
        on_progress: called with (elements done, elements in all).

    Raises:
        UserError: RG211 for another base unless `force`, RG201 and RG202 for one that does not fit, RG112 for a damaged
            delta, RG206 for sums that are not finite, RG401 to RG405 for the output.
    """
    model = delta.on(base, str(delta.path), scale=scale, force=force)
    key = run_key({"scale": scale, "digest": model.digest()})
    if not force and (done := done_before(out, key)) is not None:
        return done
    check_output(out, [model], force=force)
    record = delta.record
    remarks = check_bases([model], force=force)
    sources = model.tensors
    specs = [TensorSpec(name, source.shape, stored_dtype(source)) for name, source in sources.items()]
    parent = InputRecord.of(base, short_name(base), role="base", digest=content_digest(base), digest_kind="content")
    settings: dict[str, Any] = {"scale": scale, "kind": record.kind, "model": record.model.model_dump(mode="json")}
    settings["delta"] = delta.digest
    lineage = Lineage(kind="delta", method="delta", key=key, inputs=[parent], settings=settings, warnings=remarks)
    depends_on = {"key": key, **surroundings([model])}
    with ModelWriter(out, specs, force=force, depends_on=depends_on) as writer:
        if writer.finished:
            told = f"{len(writer.finished)} of {len(specs)} tensors are there from a run that did not end"
            warnings.warn(told, UserWarningMessage, stacklevel=2)
        work = Work(sum(spec.numel for spec in specs), on_progress)
        each(partial(_write, writer, work, scale), sources.values())
        dtype = torch_name(main_dtype((spec.dtype, spec.numel) for spec in specs))
        copy_sidecars(writer.staging, config_from=model, tokenizer_from=model, config_changes={}, dtype=dtype)
        copy_licences(writer.staging, [model])
        lineage.output = Output(
            tensors=len(specs),
            parameters=sum(spec.numel for spec in specs if is_float(spec.dtype)),
            bytes=size_on_disk(specs),
            dtype=dtype,
        )
        lineage.licence = record.licence
        lineage.finish()
        lineage.write(writer.staging)
        write_model_card(writer.staging, record, base, scale, remarks, name=writer.out.name)
        writer.publish()
    return lineage


def _write(writer: ModelWriter, work: Work, scale: float, source: TensorSource) -> None:
    """Write one tensor of the result, unless it is there."""
    count = numel(source)
    if source.name in writer.finished:
        work.advance(count)
        return
    for start, stop in slices(count):
        piece = source.read(start, stop)
        if isinstance(source, DeltaTensor) and not bool(torch.isfinite(piece.to(arithmetic(piece.dtype))).all()):
            what = f"{source.name} would hold values that are not finite"
            raise UserError("RG206", what, where=f"scale {scale:g}", fix="repair the base, or lower --scale")
        writer.write(source.name, start, piece)
        work.advance(stop - start)
    writer.finish(source.name, {})
