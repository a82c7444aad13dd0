"""From a fine-tune and its base to a delta: surveyed in a first pass, written and measured in a second.

The first pass tells what is equal, how many entries need a value of their own, and the scales: sizes are known before
anything is written. Tensors are worked on in some threads, each from its first slice to its last, so that sums and
results do not depend on how many there are.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regraft.checkpoint import Checkpoint, ModelWriter, TensorSource, TensorSpec, numel, read_json
from regraft.checkpoint.licences import combine
from regraft.checkpoint.sidecars import changed_config, copy_licences, copy_sidecars
from regraft.deltas.card import write_delta_card
from regraft.deltas.encoding import (
    Bits,
    Dense,
    Encoder,
    SparseDelta,
    added,
    arithmetic,
    largest,
    rounded,
    same_bits,
    slices,
)
from regraft.deltas.pairs import Pair, pairs
from regraft.deltas.record import FILES, Delta, Encoding, Kind, Parent, TensorRecord, dtype_name, main_dtype
from regraft.deltas.sketch import sketch, sketched, spec
from regraft.deltas.work import Work, check_output, each
from regraft.errors import UserError
from regraft.merge.onebit import takes_bits

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
    check_output(out, [model.path, base.path], force=force)
    matched, removed = pairs(base, model, force=force)
    work = _Extraction(matched, kind, density, on_progress)
    plans = each(work.plan, matched)
    if all(plan.encoding == "base" for plan in plans):
        what = "the model and the base have the same weights"
        raise UserError("RG212", what, where=model.ref, fix="name the fine-tune and the model that it was made from")
    samples = sketched(base.tensors.values())
    specs = [one for plan in plans for one in plan.specs] + [spec(source) for source in samples]
    with ModelWriter(out, specs, force=force) as writer:
        for source in samples:
            writer.write(spec(source).name, 0, sketch(source))
        measured = each(lambda pair: work.store(pair, writer), matched)
        differences = [one for one in measured if one.size is not None]
        delta = Delta(
            kind=kind,
            density=density if kind == "sparse" else None,
            base=Parent.of(base),
            model=Parent.of(model),
            tensors={pair.name: one.record for pair, one in zip(matched, measured, strict=True)},
            removed=removed,
            base_files=_keep_files(writer.staging / FILES, model, base),
            relative_error=_ratio(sum(d.error for d in differences), sum(d.size or 0.0 for d in differences)),
            exact=sum(d.exact for d in measured) / max(sum(d.numel for d in measured), 1),
            licence=combine([base, model]).licence,
        )
        copy_licences(writer.staging, [base, model])
        delta.write(writer.staging)
        write_delta_card(writer.staging, delta, name=writer.out.name)
        writer.publish()
    return delta


@dataclass(frozen=True)
class _Plan:
    """What becomes of a tensor: an encoder if it is a difference, else "base" or "whole"."""

    encoding: Encoding
    encoder: Encoder | None
    specs: list[TensorSpec]


@dataclass(frozen=True)
class _Measured:
    """A tensor that is stored: squared norms of error and change (None if it is no difference), entries that return."""

    record: TensorRecord
    numel: int
    exact: int
    error: float = 0.0
    size: float | None = None


class _Extraction:
    """The tensors of two models on their way into a delta."""

    def __init__(
        self, matched: list[Pair], kind: Kind, density: float, on_progress: Callable[[int, int], None] | None
    ) -> None:
        self._kind, self._density = kind, density
        self._work = Work(2 * sum(numel(pair.model) for pair in matched), on_progress)
        self._plans: dict[str, _Plan] = {}

    def plan(self, pair: Pair) -> _Plan:
        """Look at a tensor, and say how it will be stored."""
        plan = self._planned(pair)
        self._plans[pair.name] = plan
        self._work.advance(numel(pair.model))
        return plan

    def _planned(self, pair: Pair) -> _Plan:
        base, model = pair.base, pair.model
        if base is not None and _equal(base, model):
            return _Plan("base", None, [])
        if base is None or not pair.subtractable:
            return _Plan("whole", None, [TensorSpec(f"whole/{pair.name}", model.shape, model.dtype)])
        encoder = self._encoder(pair.name, base, model)
        return _Plan(encoder.encoding, encoder, encoder.specs)

    def _encoder(self, name: str, base: TensorSource, model: TensorSource) -> Encoder:
        odd, mean = _survey(base, model)
        if self._kind == "sparse":
            kept = max(1, round(self._density * numel(model)))
            return SparseDelta(name, model, *largest(name, base, model, kept), kept)
        if self._kind == "bits" and takes_bits(model.shape):
            return Bits(name, model, mean)
        return Dense(name, model, odd)

    def store(self, pair: Pair, writer: ModelWriter) -> _Measured:
        """Write a tensor, and measure what will come back."""
        plan, model, count = self._plans[pair.name], pair.model, numel(pair.model)
        record = TensorRecord(shape=list(model.shape), dtype=dtype_name(model.dtype), encoding=plan.encoding)
        exact, error, size = count, 0.0, None
        if plan.encoding == "whole":
            for start, stop in slices(count):
                values = model.read(start, stop)
                if values.dtype.is_floating_point:
                    _check_finite(pair.name, values.to(arithmetic(values.dtype)), "the model")
                writer.write(f"whole/{pair.name}", start, values)
        elif plan.encoder is not None and pair.base is not None:
            exact, size = 0, 0.0
            for start, own, stored, wide in _read(pair.base, model):
                change = wide - own
                back = plan.encoder.write(writer.write, start, own, stored, change)
                exact += int(same_bits(back, stored).sum())
                error += _squares(back.to(torch.float64) - stored.to(torch.float64))
                size += _squares(change)
            record.relative_error, record.exact = _ratio(error, size), exact / count
        self._work.advance(count)
        return _Measured(record, count, exact, error, size)


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


def _survey(base: TensorSource, model: TensorSource) -> tuple[int, float]:
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
    folder.mkdir()
    dtype = main_dtype({source.name: (source.dtype, numel(source)) for source in model.tensors.values()})
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
