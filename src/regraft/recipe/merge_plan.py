"""One merge step, planned: every output tensor with its sources and its resolved options. Nothing is written yet."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from regraft.adapters.merged import Combination
from regraft.axes import Layout, flat_layout, layout
from regraft.checkpoint import Checkpoint, TensorSource
from regraft.checkpoint.distance import Distance, relative_distance
from regraft.checkpoint.licences import LicenceVerdict, combine
from regraft.checkpoint.tensor import nbytes
from regraft.checkpoint.writer import TensorSpec, size_on_disk
from regraft.errors import UserError
from regraft.merge.jobs import Job, group
from regraft.merge.rule import Rule, one_model_fields
from regraft.methods import method
from regraft.recipe.adapters import combine_adapters
from regraft.recipe.build import Builder, Piece
from regraft.recipe.document import STATE_DICT, MergeStep
from regraft.recipe.fit import Member, check_architecture, check_config, check_tokenizers
from regraft.recipe.parts import check_modules, parts_of, same_model
from regraft.recipe.planned import PlannedCheckpoint, PlannedTensor
from regraft.recipe.resolve import Resolver, compile_patterns
from regraft.recipe.settings import Settings
from regraft.recipe.special_tokens import config_changes, generation_changes
from regraft.recipe.state_dict import bare, names_to_merge, refuse_more
from regraft.recipe.vocabulary import Vocabulary, plan_vocabulary

# Counts up when the same plan would give other weights, so that cached artefacts are not taken for current ones.
FORMAT = 5


@dataclass
class MergePlan:
    """What a merge step will read, compute and write."""

    step: MergeStep
    rule: Rule[Any]
    template: Member
    base: Member | None
    inputs: tuple[Member, ...]
    jobs: list[Job]
    specs: list[TensorSpec]
    config_from: Checkpoint
    config_changes: dict[str, Any]
    tokenizer_from: Checkpoint
    licence: LicenceVerdict
    seed: int
    layout: Layout
    vocabulary: Vocabulary | None = None
    generation_changes: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    combination: Combination | None = None  # of adapters, if the step makes one
    bases: tuple[Member, ...] = ()  # all of them, where slices have their own

    @property
    def parents(self) -> list[Member]:
        """Bases and models, each once."""
        return list(dict.fromkeys([*([self.base] if self.base is not None else []), *self.bases, *self.inputs]))

    @property
    def uniform(self) -> bool:
        """Whether every tensor is merged from the same models."""
        return len({job.labels for job in self.jobs if job.rule}) < 2

    @property
    def bytes_out(self) -> int:
        return size_on_disk(self.specs) if self.combination is None else self.combination.bytes_out

    @property
    def bytes_in(self) -> int:
        return sum(nbytes(s) for job in self.jobs for s in (*job.models, *([job.base] if job.base is not None else [])))

    @property
    def key(self) -> str:
        """Content address: the same inputs, options and dtypes give the same key, whatever they are called."""
        order = {id(m.checkpoint): m.checkpoint.digest() for m in [self.template, *self.parents]}
        facts = {
            "format": FORMAT,
            "rule": self.rule.name,
            "inputs": [order[id(m.checkpoint)] for m in self.inputs],
            "base": order[id(self.base.checkpoint)] if self.base else None,
            "template": order[id(self.template.checkpoint)],
            "tensors": [[s.name, list(s.shape), s.dtype] for s in self.specs],
            "options": [
                [[s.name for s in j.models], j.options.model_dump(mode="json") if j.options and j.rule else None]
                for j in self.jobs
            ],
            "double": self.step.dtype == "float64",
            "config": [self.config_from.digest(), self.config_changes],
            "tokenizer": [self.tokenizer_from.digest(), self.step.chat_template],
        }
        if self.vocabulary is not None:
            facts["vocabulary"] = self.vocabulary.digest
        if not self.uniform:
            digests = {m.name: order[id(m.checkpoint)] for m in [self.template, *self.parents]}
            facts["models of tensors"] = [[digests.get(label, "") for label in j.labels] for j in self.jobs]
        if self.combination is not None:
            facts["adapter"] = asdict(self.step.cut) if self.step.cut else "exact"
        return hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

    def as_checkpoint(self) -> PlannedCheckpoint:
        """The output as later steps may plan with it."""
        config = {**self.config_from.config, **self.config_changes}
        tensors: dict[str, TensorSource] = {s.name: PlannedTensor(s) for s in self.specs}
        files = {**self.config_from.files, **self.tokenizer_from.files}
        name = self.step.name
        made = self.vocabulary.tokenizer_json if self.vocabulary is not None else None
        path = self.config_from.path
        return PlannedCheckpoint(name, path, tensors, {}, config, files, key=self.key, tokenizer_json=made)

    def table(self) -> list[dict[str, Any]]:
        """The resolved options, tensors with equal ones together, in order of the model."""
        rows: list[dict[str, Any]] = []
        for job in self.jobs:
            options = options_of(job)
            if rows and rows[-1]["options"] == options:
                row = rows[-1]
                row["tensors"] += 1
                row["last"] = job.info.name
                layers = [n for n in (row["first_layer"], row["last_layer"], job.info.layer) if n is not None]
                if layers:
                    row["first_layer"], row["last_layer"] = min(layers), max(layers)
            else:
                layer = job.info.layer
                rows.append(
                    {
                        "first": job.info.name,
                        "last": job.info.name,
                        "tensors": 1,
                        "first_layer": layer,
                        "last_layer": layer,
                        "method": self.rule.name if job.rule else "copy",
                        "options": options,
                    }
                )
        return rows


def options_of(job: Job) -> dict[str, Any] | None:
    """The resolved options of a job as plans and records tell them, models by their names; None if it is a copy."""
    if job.rule is None or job.options is None:
        return None
    options = job.options.model_dump(mode="json", by_alias=True)
    for name in one_model_fields(type(job.options)):
        if options[name] is not None:
            options[name] = job.labels[options[name]]
    return options


@dataclass(frozen=True)
class _Cast:
    """Who takes part in a step, and how their tensors are laid out."""

    members: Mapping[str, Member]  # all that the step names
    template: Member
    base: Member | None
    bases: tuple[Member, ...]
    inputs: tuple[Member, ...]
    layouts: Mapping[str, Layout]

    @property
    def givers(self) -> list[Member]:
        """The bases, that of the step first."""
        return [*([self.base] if self.base else []), *self.bases]

    @property
    def others(self) -> list[Member]:
        """All but the template, each once."""
        return [m for m in dict.fromkeys([*self.inputs, *self.givers]) if m is not self.template]

    @property
    def own(self) -> Layout:
        return self.layouts[self.template.name]


def _cast(step: MergeStep, members: Mapping[str, Member], pieces: Sequence[Piece], *, flat: bool) -> _Cast:
    base = members[step.base] if step.base else None
    inputs = tuple(members[n] for n in dict.fromkeys(i.model for p in pieces for i in p.inputs))
    bases = tuple(members[n] for n in dict.fromkeys(p.base for p in pieces if p.base is not None))
    everyone = [*([base] if base else []), *bases, *inputs]
    template = members[step.config_from] if step.config_from else everyone[0]
    layouts = {
        m.name: flat_layout() if flat else layout(m.checkpoint.config, [*m.checkpoint.tensors])
        for m in dict.fromkeys([template, *everyone])
    }
    return _Cast(members, template, base, bases, inputs, layouts)


def plan_merge(
    step: MergeStep, members: Mapping[str, Member], settings: Settings, *, planned: bool = False
) -> MergePlan:
    """Plan one step. `members` holds every model that the step names; `planned`: some of them do not exist yet.

    Raises:
        UserError: whatever keeps these models from being merged this way.
    """
    rule = method("merge", step.method, where=step.where)
    flat = step.output == STATE_DICT
    if flat:
        refuse_more(step)
        members = {name: bare(member) for name, member in members.items()}
    tensors = settings.tensors or step.tensors
    if tensors != "same" and not flat:
        what = f"{tensors} tensors can be asked for of state dicts only"
        raise UserError("RG309", what, where=step.where, fix="leave it out, or add output: state-dict")
    parts = parts_of(step, rule, members)
    pieces = [piece for part in parts for piece in part.pieces]
    cast = _cast(step, members, pieces, flat=flat)
    excluded = compile_patterns(step.exclude, step.where)
    vocabulary, remarks = (None, []) if flat else _fit(step, cast, excluded, sliced=any(p.stacked for p in parts))
    seed = settings.seed if settings.seed is not None else step.seed
    resolver = Resolver(rule, dialect=step.dialect, where=step.where, seed=seed)
    builder = _builder(step, rule, cast, vocabulary, resolver, excluded)
    jobs: list[Job]
    changes: dict[str, Any] = {}
    if flat:
        names = names_to_merge(cast.template, cast.inputs, cast.base, tensors, excluded, where=step.where)
        jobs = builder.bare(names, pieces[0])
        remarks += resolver.remarks()
    else:
        check_modules(builder, parts, cast.others, members, cast.layouts, excluded, step)
        jobs, changes = builder.jobs(parts)
    resolver.check_filters(cast.template.checkpoint.model_type)
    _check_patterns(excluded, cast.template, step)
    group(jobs)  # raises if options vary that must not
    if rule.needs_base and not planned and not settings.force:
        for piece in dict.fromkeys(pieces):
            assert piece.base is not None  # see _piece
            remarks += _check_lineage(members[piece.base], [members[i.model] for i in piece.inputs], step)
        remarks = list(dict.fromkeys(remarks))
    combination = None
    if step.output == "lora":
        combination = combine_adapters(step, rule, cast.template, cast.base, cast.inputs, jobs, settings)
    tokenizer = members[step.tokenizer_from] if step.tokenizer_from else cast.template
    generation: dict[str, Any] = {}
    if vocabulary is not None:
        tokenizer = vocabulary.giver
        changes |= config_changes(vocabulary, cast.template.checkpoint, cast.own.vocabulary_key)
        generation = generation_changes(vocabulary, cast.template.checkpoint)
    return MergePlan(
        step=step,
        rule=rule,
        template=cast.template,
        base=cast.base,
        inputs=cast.inputs,
        jobs=jobs,
        specs=[TensorSpec(j.info.name, j.info.shape, j.out_dtype) for j in jobs],
        config_from=cast.template.checkpoint,
        config_changes=changes,
        tokenizer_from=tokenizer.checkpoint,
        licence=combine([m.checkpoint for m in [cast.template, *cast.others]]),
        seed=seed,
        layout=cast.own,
        vocabulary=vocabulary,
        generation_changes=generation,
        warnings=remarks,
        combination=combination,
        bases=cast.bases,
    )


def _fit(
    step: MergeStep, cast: _Cast, excluded: Sequence[re.Pattern[str]], *, sliced: bool
) -> tuple[Vocabulary | None, list[str]]:
    """Whether the models fit one another: the vocabulary that the step makes of theirs, and remarks."""
    template, others, own = cast.template, cast.others, cast.own
    if not sliced:
        check_architecture(template, others, cast.layouts, where=step.where)
    vocabulary = _vocabulary(step, cast.members, [*cast.givers, *cast.inputs, template], cast.layouts)
    remarks = [*vocabulary.remarks] if vocabulary is not None else []
    remarks += check_config(
        template,
        others,
        cast.layouts,
        decided=bool(step.config_from) or sliced,
        excluded=excluded,
        settled=[own.vocabulary_key] if vocabulary is not None else [],
        where=step.where,
    )
    if vocabulary is None:
        embedding = any(own.place(n).role == "embedding" and _kept(n, excluded) for n in template.checkpoint.tensors)
        free = bool(step.tokenizer_from) or not embedding or step.dialect == "mergekit"
        remarks += check_tokenizers(template, others, cast.layouts, decided=free, where=step.where)
    return vocabulary, remarks


def _builder(
    step: MergeStep,
    rule: Rule[Any],
    cast: _Cast,
    vocabulary: Vocabulary | None,
    resolver: Resolver,
    excluded: Sequence[re.Pattern[str]],
) -> Builder:
    """Makes the jobs, of the models as they look with the new vocabulary, if there is one."""
    shown = dict(cast.members)
    if vocabulary is not None:
        for member in [cast.template, *cast.others]:
            shown[member.name] = vocabulary.shown(cast.members[member.name], cast.layouts, where=step.where)
    return Builder(step, rule, shown[cast.template.name], shown, cast.layouts, resolver, excluded)


def _vocabulary(
    step: MergeStep, members: Mapping[str, Member], models: Sequence[Member], layouts: Mapping[str, Layout]
) -> Vocabulary | None:
    """The vocabulary that the step chooses, None where the models' own has to do. The base is the first of `models`."""
    if step.vocabulary is None:
        return None
    if step.output == "lora":
        what = "another vocabulary makes another base, which no adapter fits"
        raise UserError("RG309", what, where=step.vocabulary.where, fix="leave out tokenizer, or output: lora")
    owners = list(dict.fromkeys(models))
    giver = members[step.vocabulary.source] if step.vocabulary.source else owners[0]
    giver = next((m for m in owners if same_model(m, giver)), giver)
    return plan_vocabulary(step.vocabulary, owners, giver, layouts, has_base=step.base is not None)


def _kept(name: str, excluded: Sequence[re.Pattern[str]]) -> bool:
    return not any(pattern.search(name) for pattern in excluded)


def _check_patterns(excluded: Sequence[re.Pattern[str]], template: Member, step: MergeStep) -> None:
    for pattern in excluded:
        if not any(pattern.search(n) for n in template.checkpoint.tensors):
            what = f"exclude {pattern.pattern!r} selects no tensor of {template.name}"
            names = list(template.checkpoint.tensors)
            raise UserError("RG308", what, where=step.where, fix=f"its names look like {names[len(names) // 2]}")


@lru_cache(maxsize=128)  # by identity: the steps of a recipe share their inputs
def _distance(base: Checkpoint, model: Checkpoint) -> Distance:
    return relative_distance(base, model)


def _check_lineage(base: Member, inputs: Sequence[Member], step: MergeStep) -> list[str]:
    """Remarks on models that are far from the base; raises RG205 for one that does not come from it."""
    remarks = []
    for member in inputs:
        distance = _distance(base.checkpoint, member.checkpoint)
        if distance.verdict == "unrelated":
            what = f"{member.name} does not look like a fine-tune of {base.name}: {distance.sentence()}"
            fix = "name the base that it was fine-tuned from, or go on with --force"
            raise UserError("RG205", what, where=step.where, fix=fix)
        if distance.verdict == "far":
            remarks.append(f"{member.name} and {base.name} are {distance.sentence()}")
    return remarks
