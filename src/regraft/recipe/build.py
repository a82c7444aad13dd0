"""From one step's models and settings to the jobs of the engine: whole models or modules, or layers from slices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regraft.axes import Layout, Modules
from regraft.checkpoint import TensorSource
from regraft.checkpoint.dtypes import from_torch_name, is_float
from regraft.checkpoint.tensor import stored_dtype
from regraft.errors import UserError
from regraft.merge.jobs import Job
from regraft.merge.rule import Rule, TensorInfo
from regraft.recipe.document import Input, MergeStep, Setting
from regraft.recipe.fields import DTYPES as FLOATS
from regraft.recipe.fit import Member, matching
from regraft.recipe.planned import PlannedCheckpoint
from regraft.recipe.resolve import Resolver


@dataclass(frozen=True, eq=False)
class Piece:
    """A slice as it is computed: the base taken out of the models, its own layer range remembered.

    `levels`: settings for all of its models, from the closest to the widest, without those of the step.
    """

    inputs: tuple[Input, ...]
    levels: tuple[Mapping[str, Setting], ...] = ()
    base: str | None = None
    base_layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Part:
    """What is merged by itself: a module, or the whole model if that is None; `stacked`: of layers from slices."""

    module: str | None
    pieces: tuple[Piece, ...]
    stacked: bool
    where: str


class Builder:
    """Turns one step into jobs. `members` are the models as the merge sees them, by the names that the step uses."""

    def __init__(
        self,
        step: MergeStep,
        rule: Rule[Any],
        template: Member,
        members: Mapping[str, Member],
        layouts: Mapping[str, Layout],
        resolver: Resolver,
        excluded: Sequence[re.Pattern[str]],
    ) -> None:
        self.step, self.rule, self.template = step, rule, template
        self.members, self.layouts, self.resolver, self.excluded = members, layouts, resolver, excluded
        self.layout = layouts[template.name]
        self.modules = Modules(template.checkpoint.config, self.layout, template.checkpoint.tensors)
        chosen = step.out_dtype or step.dtype
        self.dtype = _dtype(chosen, step) if chosen else None

    def jobs(self, parts: Sequence[Part]) -> tuple[list[Job], dict[str, Any]]:
        """The jobs of all parts, and what changes in the configuration."""
        jobs: list[Job] = []
        counts: dict[str, int] = {}
        changes: dict[str, Any] = {}
        skip = self._tied_copies()
        for part in parts:
            every = self.template.checkpoint.tensors
            names = [n for n in every if n not in skip and part.module in (None, self.modules.of(n))]
            if not part.stacked:
                jobs += [self._whole(name, part.pieces[0]) for name in names]
                continue
            stack, key = self._stack(part)
            made, counts[key] = self._stacked(part.pieces, names, stack)
            jobs += made
            changes |= self._per_layer_config(part.pieces, stack, key)
        if counts:  # all of them: a configuration may leave out one that is equal to another
            known = self.layout.layer_count_key
            changes |= {key: self.layout.stacks[stack] for stack, key in known.items() if stack in self.layout.stacks}
        return jobs, changes | counts

    def bare(self, names: Sequence[str], piece: Piece) -> list[Job]:
        """Tensors by name, of which each is merged from the models that have it."""
        jobs = []
        for name in names:
            inputs = tuple(i for i in piece.inputs if self.members[i.model].find(name) is not None)
            found = {m: m.find(name) for m in (self.template, *(self.members[i.model] for i in inputs))}
            giver, reference = next((m, source) for m, source in found.items() if source is not None)
            info = TensorInfo.of(name, reference.shape, self.layout)
            jobs.append(self._job(info, name, reference, replace(piece, inputs=inputs), 0.0, giver=giver))
        return jobs

    def _whole(self, name: str, piece: Piece) -> Job:
        """A tensor of the template from the same tensor of all models."""
        reference = self.template.checkpoint.tensors[name]
        info = TensorInfo.of(name, reference.shape, self.layout)
        return self._job(info, name, reference, piece, self._depth(info))

    def _stacked(self, slices: Sequence[Piece], names: Sequence[str], stack: str) -> tuple[list[Job], int]:
        """Layers stacked from slices, and how many; what lies outside them comes from the first or the last slice."""
        places = {name: self.layout.place(name) for name in names}
        outside = [n for n in names if places[n].layer is None or self.layout.of_the_stack(n)]
        before = [n for n in outside if places[n].position != "after"]
        after = [n for n in outside if places[n].position == "after"]
        total = sum(_length(s, self.step) for s in slices)
        jobs = [self._outside(n, slices[0], total) for n in before]
        offset = 0
        for piece in slices:
            jobs += list(self._slice_jobs(piece, offset, total, stack))
            offset += _length(piece, self.step)
        return [*jobs, *(self._outside(n, slices[-1], total) for n in after)], total

    def _slice_jobs(self, piece: Piece, offset: int, total: int, stack: str) -> Iterator[Job]:
        first = self.members[piece.inputs[0].model]
        theirs = self.layouts[first.name]
        starts = [(i.layers or (0, 0))[0] for i in piece.inputs]
        length = _length(piece, self.step)
        for one in piece.inputs:
            top = self.layouts[self.members[one.model].name].stacks.get(stack, 0)
            low, high = one.layers or (0, 0)
            if not 0 <= low < high <= top:
                what = f"layers {low} to {high} of {one.model}, which has layers 0 to {top}"
                raise UserError("RG303", what, where=self.step.where, fix=f"choose a range within [0, {top}]")
        names = [n for n in first.checkpoint.tensors if theirs.place(n).stack == stack and not theirs.of_the_stack(n)]
        for index in range(length):
            for name in names:
                if theirs.place(name).layer != starts[0] + index:
                    continue
                reference = first.checkpoint.tensors[name]
                out, place = theirs.renamed(name, offset + index), theirs.place(name)
                info = TensorInfo(out, reference.shape, offset + index, total, stack, place.role, place.transposed)
                depth = index / (length - 1) if length > 1 else 1.0
                yield self._job(info, name, reference, piece, depth, [start + index for start in starts], first)

    def _outside(self, name: str, piece: Piece, total: int) -> Job:
        reference = self.template.checkpoint.tensors[name]
        info = replace(TensorInfo.of(name, reference.shape, self.layout), num_layers=total)
        return self._job(info, name, reference, piece, 0.0 if info.layer is not None else self._depth(info))

    def _job(
        self,
        info: TensorInfo,
        name: str,
        reference: TensorSource,
        piece: Piece,
        depth: float,
        layers: Sequence[int] | None = None,
        giver: Member | None = None,
    ) -> Job:
        """The job for the output tensor `info`; `name` is what the model calls it that `reference` comes from.

        `layers`: in slices, the layer that each input contributes. `giver`: that model, if not the template.
        """
        out = info.name
        if not is_float(stored_dtype(reference)) or any(p.search(out) for p in self.excluded):
            own = stored_dtype(reference)
            dtype = self.dtype if self.dtype and is_float(own) else own
            return Job(info, (reference,), dtype, labels=((giver or self.template).name,))
        sources = tuple(
            self._source(self.members[one.model], name, reference, layers[i] if layers else None)
            for i, one in enumerate(piece.inputs)
        )
        base = None
        if piece.base is not None and self.rule.reads_base:
            base = self._source(self.members[piece.base], name, reference, self._base_layer(piece, layers))
        levels = [*piece.levels, self.step.settings]
        theirs = [
            self._called(self.members[i.model], name, at) for i, at in zip(piece.inputs, layers or (), strict=False)
        ]
        options = self.resolver.options(out, depth, list(piece.inputs), levels, theirs)
        labels = (*(i.model for i in piece.inputs), piece.base or "")
        double = self.step.dtype == "float64"
        return Job(info, sources, self.dtype or stored_dtype(reference), self.rule, options, base, labels, double)

    def _source(self, member: Member, name: str, reference: TensorSource, layer: int | None) -> TensorSource:
        own = self.layouts[member.name]
        return matching(self._called(member, name, layer), reference, member, layout=own, where=self.step.where)

    def _called(self, member: Member, name: str, layer: int | None) -> str:
        """What a model calls the tensor `name`, in the layer that it contributes."""
        return self.layouts[member.name].renamed(name, layer) if layer is not None else name

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

    def _stack(self, part: Part) -> tuple[str, str]:
        """The layers that a part's slices are of, and the configuration's key of their number."""
        kind = self.template.checkpoint.model_type or "this model"
        if part.module is not None:
            if part.module not in self.modules.layers:
                what = f"slices need layers, and none are known of the module {part.module} of {kind}"
                raise UserError("RG208", what, where=part.where, fix="merge it as a whole with models: instead")
            return self.modules.layers[part.module]
        keys = self.layout.layer_count_key
        if len(self.layout.stacks) != 1 or not keys:
            what = f"slices need one known stack of layers, and {kind} has {_names(self.layout.stacks)}"
            fix = "merge whole models with models: instead"
            if len(self.modules.names) > 1:
                fix += f", or in a mergekit file each of its modules: {', '.join(self.modules.names)}"
            raise UserError("RG208", what, where=self.step.where, fix=fix)
        stack = next(iter(self.layout.stacks))
        return stack, keys[stack]

    def _per_layer_config(self, slices: Sequence[Piece], stack: str, count: str) -> dict[str, Any]:
        """Lists in the configuration that have one entry per layer, such as layer_types; beside the key `count`."""
        depth = self.layout.stacks[stack]
        prefix = count.rpartition(".")[0]
        changes = {}
        for key, value in _below(self.template.checkpoint.config, prefix).items():
            if isinstance(value, list) and len(value) == depth and "layer" in key:
                picked: list[Any] = []
                for piece in slices:
                    one = piece.inputs[0]
                    config = _below(self.members[one.model].checkpoint.config, prefix)
                    low, high = one.layers or (0, depth)
                    picked += config.get(key, value)[low:high]
                changes[f"{prefix}.{key}" if prefix else key] = picked
        return changes


def _below(config: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """The part of a configuration at a dotted prefix; the whole for the empty one."""
    for part in filter(None, prefix.split(".")):
        config = config.get(part) or {}
    return config


def _names(stacks: Mapping[str, int]) -> str:
    return ", ".join(s or "one of unknown config key" for s in stacks) or "none"


def _length(piece: Piece, step: MergeStep) -> int:
    lengths = {high - low for low, high in ((i.layers or (0, 0)) for i in piece.inputs)}
    if len(lengths) != 1:
        what = f"a slice takes {' and '.join(str(n) for n in sorted(lengths))} layers from its models"
        raise UserError("RG303", what, where=step.where, fix="give layer ranges of one length")
    return lengths.pop()


def _dtype(name: str, step: MergeStep) -> str:
    if name not in FLOATS:
        what = f"dtype {name!r} is not one of {', '.join(FLOATS)}"
        raise UserError("RG303", what, where=step.where, fix="change dtype")
    return from_torch_name(name)
