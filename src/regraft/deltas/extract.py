"""From a fine-tune and its base to a delta: surveyed in a first pass, written and measured in a second.

The first pass tells what is equal, how many entries need a value of their own, and the scales: sizes are known before
anything is written. Tensors are worked on in some threads, each from its first slice to its last, so that sums and
results do not depend on how many there are. Both passes note each tensor that is done, so that a run that died goes on.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft.checkpoint import Checkpoint, ModelWriter, TensorSource, numel, read_json
from regraft.checkpoint.delta import check_bases, open_delta
from regraft.checkpoint.delta_record import (
    FILES,
    Delta,
    Kind,
    Parent,
    TensorRecord,
    content_digest,
)
from regraft.checkpoint.delta_sketch import sketch, sketched
from regraft.checkpoint.delta_sketch import spec as sketch_spec
from regraft.checkpoint.delta_tensor import added, arithmetic, slices
from regraft.checkpoint.dtypes import main_dtype, torch_name
from regraft.checkpoint.job_folder import JobFolder
from regraft.checkpoint.licences import combine
from regraft.checkpoint.onebit import takes_bits
from regraft.checkpoint.output import remove
from regraft.checkpoint.sidecars import changed_config, copy_licences, copy_sidecars
from regraft.checkpoint.surroundings import settle_up_to_date, surroundings
from regraft.checkpoint.tensor import stored_dtype
from regraft.checkpoint.weights import is_delta
from regraft.deltas.card import write_delta_card
from regraft.deltas.encoding import Bits, Dense, Encoder, SparseDelta, Whole, largest, rounded, same_bits
from regraft.deltas.pairs import Pair, pairs
from regraft.deltas.work import Work, check_output, each
from regraft.errors import UserError

_WEIGHTS = "weights"  # within the staging folder, until all of them are there
DENSITY = 0.1


def extract(
    model: Checkpoint,
    base: Checkpoint,
    out: Path,
    kind: Kind = "dense",
    *,
    density: float | None = None,
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Delta:
    """Write the difference between a fine-tune and its base into the folder `out`.

    The same call goes on with what an unfinished one has surveyed and stored, and does nothing after a finished one.

    Args:
        kind: "dense" gives the fine-tune back bit for bit; "sparse" and "bits" approximate it.
        density: share of the entries of each tensor that "sparse" keeps, in (0, 1]; a tenth if None.
        force: replace an output that exists, and go on although the model does not look like a fine-tune of the base.
        on_progress: called with (elements done, elements in all).

    Raises:
        UserError: what `pairs` raises; RG206 for values that are not finite, RG212 if nothing differs, RG303 for a
            density that is out of range or of another kind, RG401 to RG405 for the output.
    """
    if density is not None and kind != "sparse":
        raise UserError("RG303", f"a {kind} delta has no density", fix="leave it out, or take the kind sparse")
    density = DENSITY if density is None else density
    if not 0 < density <= 1:
        raise UserError("RG303", f"the density is {density} and must be above 0 and at most 1", fix="try 0.1")
    if not force and (done := _done_before(out, model, base, kind, density)) is not None:
        return done
    check_output(out, [model, base], force=force)
    matched, removed = pairs(base, model, force=force)
    check_bases([model, base], force=force)
    work = Work(2 * sum(numel(pair.model) for pair in matched), on_progress)
    names = [pair.name for pair in matched]
    parts = [f"{part} {name}" for part in ("survey", "store") for name in names] + ["weights", "base", "model"]
    depends_on = {"kind": kind, "density": density, "digests": [base.digest(), model.digest()]}
    depends_on |= surroundings([base, model])
    with JobFolder(out, parts, depends_on, force=force) as job:
        surveys = each(lambda pair: _survey(pair, kind, density, job, work), matched)
        if all(survey["encoding"] == "base" for survey in surveys):
            what, fix = "the model and the base have the same weights", "name the fine-tune and what it was made from"
            raise UserError("RG212", what, where=model.ref, fix=fix)
        measured = _write_weights(job, base, matched, surveys, work)
        _take_up(job.staging / _WEIGHTS, job.staging)
        differences = [one for one in measured if one["size"] is not None]
        delta = Delta(
            kind=kind,
            density=density if kind == "sparse" else None,
            base=Parent(**job.once("base", lambda: Parent.of(base).model_dump())),
            model=Parent(**job.once("model", lambda: Parent.of(model).model_dump())),
            tensors={pair.name: _record(pair, one) for pair, one in zip(matched, measured, strict=True)},
            removed=removed,
            base_files=_keep_files(job.staging / FILES, model, base),
            relative_error=_ratio(sum(d["error"] for d in differences), sum(d["size"] for d in differences)),
            exact=sum(d["exact"] for d in measured) / max(sum(numel(pair.model) for pair in matched), 1),
            licence=combine([base, model]).licence,
        )
        copy_licences(job.staging, [base, model])
        delta.write(job.staging)
        write_delta_card(job.staging, delta, name=job.out.name)
        job.publish()
    return delta


def _done_before(out: Path, model: Checkpoint, base: Checkpoint, kind: Kind, density: float) -> Delta | None:
    """The delta at `out` if it is the one that is asked for; both models are read if it looks like it."""
    if not is_delta(out):
        return None
    try:
        made = open_delta(out).record
    except UserError:
        return None  # whatever it is, it is not ours
    if (made.kind, made.density) != (kind, density if kind == "sparse" else None):
        return None
    if (made.base.digest, made.model.digest) != (content_digest(base), content_digest(model)):
        return None
    settle_up_to_date(out)
    return made


def _survey(pair: Pair, kind: Kind, density: float, job: JobFolder, work: Work) -> dict[str, Any]:
    """Look at a tensor, and say how it will be stored: the encoding, and what its encoder needs."""

    def look() -> dict[str, Any]:
        base, model = pair.base, pair.model
        if base is not None and _equal(base, model):
            return {"encoding": "base"}
        if base is None or not pair.subtractable or not numel(model):
            return {"encoding": "whole"}
        odd, mean = _differences(base, model)
        if kind == "sparse":
            kept = max(1, round(density * numel(model)))
            threshold, above = largest(pair.name, base, model, kept)
            return {"encoding": "sparse", "threshold": threshold, "above": above, "kept": kept}
        if kind == "bits" and takes_bits(model.shape):
            return {"encoding": "bits", "scale": mean}
        return {"encoding": "dense", "odd": odd}

    found = job.once(f"survey {pair.name}", look)
    work.advance(numel(pair.model))
    return found


def _write_weights(
    job: JobFolder, base: Checkpoint, matched: list[Pair], surveys: list[dict[str, Any]], work: Work
) -> list[dict[str, Any]]:
    """Store all tensors in a folder within the staging folder; the figures of each."""
    encoders = {pair.name: _encoder(pair, survey) for pair, survey in zip(matched, surveys, strict=True)}
    samples = sketched(base.tensors.values())
    specs = [spec for one in encoders.values() if one is not None for spec in one.specs]
    specs += [sketch_spec(source) for source in samples]
    if "weights" in job.done:  # they are there, whole
        work.advance(sum(numel(pair.model) for pair in matched))
        return [job.done[f"store {pair.name}"] for pair in matched]
    depends_on = {"surveys": surveys}  # the folder around it has made sure of the rest
    with ModelWriter(job.staging / _WEIGHTS, specs, force=True, depends_on=depends_on) as writer:

        def store(pair: Pair) -> dict[str, Any]:
            encoder = encoders[pair.name]
            stored = [spec.name for spec in encoder.specs] if encoder is not None else []
            if not all(name in writer.finished for name in stored):
                job.done.pop(f"store {pair.name}", None)  # noted, but not there

            def write() -> dict[str, Any]:
                found = _store(pair, encoder, writer)
                for name in stored:
                    writer.finish(name, {})
                return found

            found = job.once(f"store {pair.name}", write)
            work.advance(numel(pair.model))
            return found

        for source in samples:
            writer.write(sketch_spec(source).name, 0, sketch(source))
        measured = each(store, matched)
        writer.publish()
    job.once("weights", dict)
    return measured


def _encoder(pair: Pair, survey: dict[str, Any]) -> Encoder | Whole | None:
    """What writes a tensor; None if nothing is stored."""
    name, model = pair.name, pair.model
    match survey["encoding"]:
        case "whole":
            return Whole(name, model)
        case "sparse":
            return SparseDelta(name, model, survey["threshold"], survey["above"], survey["kept"])
        case "bits":
            return Bits(name, model, survey["scale"])
        case "dense":
            return Dense(name, model, survey["odd"])
    return None


def _store(pair: Pair, encoder: Encoder | Whole | None, writer: ModelWriter) -> dict[str, Any]:
    """Write a tensor and measure what will come back: entries that are exact, squared norms of error and change."""
    model, count = pair.model, numel(pair.model)
    exact, error, size = count, 0.0, None
    if isinstance(encoder, Whole):
        for start, stop in slices(count):
            values = model.read(start, stop)
            if values.dtype.is_floating_point:
                _check_finite(pair.name, values.to(arithmetic(values.dtype)), "the model")
            writer.write(f"whole/{pair.name}", start, values)
    elif encoder is not None and pair.base is not None:
        exact, size = 0, 0.0
        for start, own, stored, wide in _read(pair.base, model):
            change = wide - own
            back = encoder.write(writer.write, start, own, stored, change)
            exact += int(same_bits(back, stored).sum())
            error += _squares(back.to(torch.float64) - stored.to(torch.float64))
            size += _squares(change)
    encoding = "base" if encoder is None else encoder.encoding
    return {"encoding": encoding, "exact": exact, "error": error, "size": size}


def _record(pair: Pair, measured: dict[str, Any]) -> TensorRecord:
    return TensorRecord(
        shape=list(pair.model.shape),
        dtype=stored_dtype(pair.model),
        encoding=measured["encoding"],
        relative_error=_ratio(measured["error"], measured["size"] or 0.0),
        exact=measured["exact"] / numel(pair.model) if numel(pair.model) else 1.0,
    )


def _take_up(folder: Path, to: Path) -> None:
    """Move what is in a folder to the one that holds it; a run that died within it is gone on with."""
    if folder.is_dir():
        for path in folder.iterdir():
            path.replace(to / path.name)
        folder.rmdir()


def _read(base: TensorSource, model: TensorSource) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(first element, the base's values to compute with, the model's as stored, the model's to compute with)."""
    dtype = arithmetic(base.dtype, model.dtype)
    for start, stop in slices(numel(model)):
        stored = model.read(start, stop)
        yield start, base.read(start, stop).to(dtype), stored, stored.to(dtype)


def _equal(base: TensorSource, model: TensorSource) -> bool:
    """Whether two tensors of one shape agree in dtype and every bit; stops at the first difference."""
    if base.dtype != model.dtype or base.shape != model.shape:
        return False
    return all(bool(same_bits(base.read(*at), model.read(*at)).all()) for at in slices(numel(model)))


def _differences(base: TensorSource, model: TensorSource) -> tuple[int, float]:
    """How many entries base plus difference does not give back, and the mean size of the changes.

    Raises:
        UserError: RG206 if a value is not finite.
    """
    odd, total = 0, 0.0
    for _, own, stored, wide in _read(base, model):
        _check_finite(base.name, own, "the base")
        _check_finite(model.name, wide, "the model")
        change = wide - own
        back = added(own, rounded(change, model.dtype).to(own.dtype), 1.0, model.dtype)
        odd += int((~same_bits(back, stored)).sum())
        total += float(change.abs().sum(dtype=torch.float64))
    return odd, total / max(numel(model), 1)


def _check_finite(name: str, values: Tensor, where: str) -> None:
    if not bool(torch.isfinite(values).all()):
        what = f"{name} holds values that are NaN or infinite"
        raise UserError("RG206", what, where=where, fix="repair that model")


def _squares(values: Tensor) -> float:
    return float(values.to(torch.float64).square().sum())


def _ratio(error: float, size: float) -> float:
    """|error| / |change| from squared norms."""
    return math.sqrt(error / size) if size else 0.0


def _keep_files(folder: Path, model: Checkpoint, base: Checkpoint) -> list[str]:
    """Write what stands beside the model's weights and is not the base's; return the names of what is."""
    remove(folder)  # of a run that died
    folder.mkdir()
    dtype = torch_name(main_dtype((stored_dtype(source), numel(source)) for source in model.tensors.values()))
    names = copy_sidecars(folder, config_from=model, tokenizer_from=model, config_changes={}, dtype=dtype)
    shared = []
    for name in names:
        path, theirs = folder / name, base.files.get(name)
        if name == "config.json":
            same = read_json(path) == changed_config(base.config, {}, dtype)
        else:
            same = theirs is not None and filecmp.cmp(path, theirs, shallow=False)
        # sentence-transformers: modules.json names folders, and is kept together with what is in them
        if same and name != "modules.json" and "/" not in name:
            path.unlink()
            shared.append(name)
    if not any(folder.iterdir()):
        folder.rmdir()  # repositories do not keep empty folders
    return shared
