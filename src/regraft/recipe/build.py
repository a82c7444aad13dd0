"""From one step's models and settings to the jobs of the engine: whole models, or layers stacked from slices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from regraft.axes import Layout
from regraft.checkpoint import TensorSource
from regraft.errors import UserError
from regraft.merge.jobs import Job
from regraft.merge.rule import Rule, TensorInfo
from regraft.recipe.document import Input, MergeStep, Setting
from regraft.recipe.fit import Member, matching
from regraft.recipe.planned import PlannedCheckpoint
from regraft.recipe.resolve import Resolver

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Piece:
    """A slice as it is computed: the base taken out of the models, its own layer range remembered."""

    inputs: tuple[Input, ...]
    settings: Mapping[str, Setting]
    base_layers: tuple[int, int] | None = None


class Builder:
    """Turns one step into jobs."""

    def __init__(
        self,
        step: MergeStep,
        rule: Rule[Any],
        template: Member,
        base: Member | None,
        members: Mapping[str, Member],
        layouts: Mapping[str, Layout],
        resolver: Resolver,
        excluded: Sequence[re.Pattern[str]],
    ) -> None:
        self.step, self.rule, self.template, self.base = step, rule, template, base
        self.members, self.layouts, self.resolver, self.excluded = members, layouts, resolver, excluded
        self.layout = layouts[template.name]
        chosen = step.out_dtype or step.dtype
        self.dtype = _dtype(chosen, step) if chosen else None

    def whole(self, piece: Piece) -> list[Job]:
        """All models, tensor by tensor of the template."""
        jobs = []
        skip = self._tied_copies()
        for name, reference in self.template.checkpoint.tensors.items():
            if name in skip:
                continue
            info = TensorInfo.of(name, reference.shape, self.layout)
            jobs.append(self._job(info, name, reference, piece, self._depth(info)))
        return jobs

    def sliced(self, slices: Sequence[Piece]) -> tuple[list[Job], dict[str, Any]]:
        """Layers stacked from slices; what lies outside the layers comes from the first or the last slice."""
        stack, key = self._only_stack()
        names = self.template.checkpoint.tensors
        skip = self._tied_copies()
        before = [n for n in names if self.layout.place(n).layer is None and self.layout.place(n).position != "after"]
        after = [n for n in names if self.layout.place(n).layer is None and self.layout.place(n).position == "after"]
        total = sum(_length(s, self.step) for s in slices)
        jobs = [j for n in before if n not in skip for j in [self._outside(n, slices[0], total)]]
        offset = 0
        for piece in slices:
            jobs += list(self._slice_jobs(piece, offset, total, stack))
            offset += _length(piece, self.step)
        jobs += [self._outside(n, slices[-1], total) for n in after if n not in skip]
        return jobs, {key: total, **self._per_layer_config(slices, stack)}

    def _slice_jobs(self, piece: Piece, offset: int, total: int, stack: str) -> Iterator[Job]:
        first = self.members[piece.inputs[0].model]
        theirs = self.layouts[first.name]
        starts = [(i.layers or (0, 0))[0] for i in piece.inputs]
        length = _length(piece, self.step)
        for one in piece.inputs:
            top = self.layouts[self.members[one.model].name].stacks[stack]
            low, high = one.layers or (0, 0)
            if not 0 <= low < high <= top:
                what = f"layers {low} to {high} of {one.model}, which has layers 0 to {top}"
                raise UserError("RG303", what, where=self.step.where, fix=f"choose a range within [0, {top}]")
        names = list(first.checkpoint.tensors)
        for index in range(length):
            for name in names:
                if theirs.place(name).layer != starts[0] + index:
                    continue
                reference = first.checkpoint.tensors[name]
                out, place = theirs.renamed(name, offset + index), theirs.place(name)
                info = TensorInfo(out, reference.shape, offset + index, total, stack, place.role, place.transposed)
                depth = index / (length - 1) if length > 1 else 1.0
                yield self._job(info, name, reference, piece, depth, [start + index for start in starts])

    def _outside(self, name: str, piece: Piece, total: int) -> Job:
        reference = self.template.checkpoint.tensors[name]
        info = replace(TensorInfo.of(name, reference.shape, self.layout), num_layers=total)
        return self._job(info, name, reference, piece, self._depth(info))

    def _job(
        self,
        info: TensorInfo,
        name: str,
        reference: TensorSource,
        piece: Piece,
        depth: float,
        layers: Sequence[int] | None = None,
    ) -> Job:
        """The job for the output tensor `info`; `name` is what the first model calls it.

        `layers`: in slices, the layer that each input contributes.
        """
        out = info.name
        if not reference.dtype.is_floating_point or any(p.search(out) for p in self.excluded):
            dtype = self.dtype if self.dtype and reference.dtype.is_floating_point else reference.dtype
            return Job(info, (reference,), dtype, labels=(self.template.name,))
        sources = tuple(
            self._source(self.members[one.model], name, reference, layers[i] if layers else None)
            for i, one in enumerate(piece.inputs)
        )
        base = None
        if self.base is not None and self.rule.reads_base:
            base = self._source(self.base, name, reference, self._base_layer(piece, layers))
        levels: list[Mapping[str, Setting]] = [piece.settings, self.step.settings]
        options = self.resolver.options(out, depth, list(piece.inputs), levels)
        labels = (*(i.model for i in piece.inputs), self.step.base or "")
        double = self.step.dtype == "float64"
        return Job(info, sources, self.dtype or reference.dtype, self.rule, options, base, labels, double)

    def _source(self, member: Member, name: str, reference: TensorSource, layer: int | None) -> TensorSource:
        own = self.layouts[member.name]
        theirs = own.renamed(name, layer) if layer is not None else name
        return matching(theirs, reference, member, layout=own, where=self.step.where)

    def _base_layer(self, piece: Piece, layers: Sequence[int] | None) -> int | None:
        """The base's own layer range if the slice lists it, else the first model's."""
        if layers is None:
            return None
        if piece.base_layers is not None and piece.inputs[0].layers is not None:
            return layers[0] - piece.inputs[0].layers[0] + piece.base_layers[0]
        return layers[0]

    def _depth(self, info: TensorInfo) -> float:
        if info.layer is not None:
            return info.layer / (info.num_layers - 1) if info.num_layers and info.num_layers > 1 else 1.0
        after = self.layout.place(info.name).position == "after"
        return 1.0 if after and self.step.dialect == "regraft" else 0.0

    def _tied_copies(self) -> set[str]:
        """Tensors that the template stores twice although they are tied: written once."""
        own = self.template.checkpoint
        copies = set()
        for alias, canonical in self.layout.tied:
            if alias in own.tensors and canonical in own.tensors:
                if not isinstance(own, PlannedCheckpoint) and not own.same_bytes(alias, canonical):
                    what = f"{self.template.name} ties {alias} to {canonical}, but stores different values for them"
                    fix = "set tie_word_embeddings to false in its config.json, or save it again with transformers"
                    raise UserError("RG209", what, where=self.step.where, fix=fix)
                copies.add(alias)
        return copies

    def _only_stack(self) -> tuple[str, str]:
        keys = self.layout.layer_count_key
        if len(self.layout.stacks) != 1 or not keys:
            kind = self.template.checkpoint.model_type or "this model"
            what = f"slices need one known stack of layers, and {kind} has {_names(self.layout.stacks)}"
            raise UserError("RG208", what, where=self.step.where, fix="merge whole models with models: instead")
        stack = next(iter(self.layout.stacks))
        return stack, keys[stack]

    def _per_layer_config(self, slices: Sequence[Piece], stack: str) -> dict[str, Any]:
        """Lists in the configuration that have one entry per layer, such as layer_types."""
        depth = self.layout.stacks[stack]
        changes = {}
        for key, value in self.template.checkpoint.config.items():
            if isinstance(value, list) and len(value) == depth and "layer" in key:
                picked: list[Any] = []
                for piece in slices:
                    one = piece.inputs[0]
                    config = self.members[one.model].checkpoint.config
                    low, high = one.layers or (0, depth)
                    picked += config.get(key, value)[low:high]
                changes[key] = picked
        return changes


def _names(stacks: Mapping[str, int]) -> str:
    return ", ".join(s or "one of unknown config key" for s in stacks) or "none"


def _length(piece: Piece, step: MergeStep) -> int:
    lengths = {high - low for low, high in ((i.layers or (0, 0)) for i in piece.inputs)}
    if len(lengths) != 1:
        what = f"a slice takes {' and '.join(str(n) for n in sorted(lengths))} layers from its models"
        raise UserError("RG303", what, where=step.where, fix="give layer ranges of one length")
    return lengths.pop()


def _dtype(name: str, step: MergeStep) -> torch.dtype:
    if name not in _DTYPES:
        what = f"dtype {name!r} is not one of {', '.join(_DTYPES)}"
        raise UserError("RG303", what, where=step.where, fix="change dtype")
    return _DTYPES[name]
