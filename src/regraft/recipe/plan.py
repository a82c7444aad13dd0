"""Recipe -> plan: everything is opened, checked and sized before work starts; of the weights, only samples are read."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft.checkpoint import Checkpoint, open_checkpoint
from regraft.checkpoint.device import usable_device
from regraft.checkpoint.dtypes import torch_name
from regraft.checkpoint.output import reserved, unfinished_in
from regraft.errors import UserError
from regraft.merge.jobs import Job, all_compiled, default_chunk, default_workers, fit_memory
from regraft.methods import Options, method
from regraft.recipe.document import EvaluateStep, Input, MakeStep, MergeStep, Recipe
from regraft.recipe.estimate import RUN_BYTES, Estimate, estimate, process_memory
from regraft.recipe.fit import Member
from regraft.recipe.making import MakePlan, plan_make
from regraft.recipe.merge_plan import MergePlan, plan_merge
from regraft.recipe.settings import Settings


@dataclass
class EvaluatePlan:
    """A measurement that a run will make, validated."""

    step: EvaluateStep
    metric: Any
    options: Options
    data: Path | None
    models: tuple[str, ...]
    folded: dict[str, MergePlan] = field(default_factory=dict)  # models that metrics need written as a folder


@dataclass
class Plan:
    """All steps of a recipe, in order, with what they cost.

    `disk_bytes` is the sum of all outputs.
    """

    recipe: Recipe
    settings: Settings
    steps: list[MergePlan | MakePlan | EvaluatePlan]
    workers: int
    chunk: int
    disk_bytes: int
    members: Members
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def estimates(self) -> list[Estimate]:
        """What each merge takes, measured on samples when it is first asked for."""
        return [
            estimate(
                plan.jobs,
                plan.bytes_in + plan.bytes_out,
                workers=self.workers,
                chunk=self.chunk,
                device=self.settings.device,
            )
            for plan in self.merges
        ]

    @property
    def seconds(self) -> float:
        """Estimated time for all merges."""
        return sum(each.seconds for each in self.estimates)

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of the private memory of the whole process."""
        return max((each.memory_bytes for each in self.estimates), default=process_memory())

    @property
    def merges(self) -> list[MergePlan]:
        return [s for s in self.steps if isinstance(s, MergePlan)]

    @property
    def makes(self) -> list[MergePlan | MakePlan]:
        """The steps that make a model, in order."""
        return [s for s in self.steps if isinstance(s, (MergePlan, MakePlan))]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data: what `regraft plan --json` prints."""
        return {
            "recipe": self.recipe.path.name if self.recipe.path else "",
            "workers": self.workers,
            "chunk_elements": self.chunk,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds_estimated": round(self.seconds, 1),
            "warnings": self.warnings,
            "steps": [_describe(s) for s in self.steps],
        }


def _describe(plan: MergePlan | MakePlan | EvaluatePlan) -> dict[str, Any]:
    if isinstance(plan, MakePlan):
        return plan.to_dict()
    if isinstance(plan, EvaluatePlan):
        options = plan.options.model_dump(mode="json")
        facts = {"step": plan.step.name, "evaluate": plan.metric.name, "models": list(plan.models), "options": options}
        return facts | ({"written": {name: one.bytes_out for name, one in plan.folded.items()}} if plan.folded else {})
    return {
        "step": plan.step.name,
        "merge": plan.rule.name,
        "dialect": plan.step.dialect,
        "models": [m.name for m in plan.inputs],
        "base": plan.base.name if plan.base else None,
        "config_from": plan.template.name,
        "tensors": len(plan.jobs),
        "parameters": sum(job.info.numel for job in plan.jobs),
        "bytes_read": plan.bytes_in,
        "bytes_written": plan.bytes_out,
        "dtypes": sorted({torch_name(s.dtype) for s in plan.specs}),
        "licence": plan.licence.licence,
        "config_changes": plan.config_changes,
        "vocabulary": plan.vocabulary.report if plan.vocabulary is not None else None,
        "seed": plan.seed,
        "key": plan.key,
        "values": plan.table(),
        "warnings": plan.warnings,
    }


def make_plan(recipe: Recipe, settings: Settings | None = None, *, out: Path | None = None) -> Plan:
    """Open and check everything that a recipe needs.

    Args:
        recipe: from `load_recipe` or `parse_recipe`.
        settings: switches of the run.
        out: where the results will go, to check the disk; not checked if None.

    Raises:
        UserError: the first obstacle, whatever it is; nothing has been written.
    """
    settings = settings or Settings()
    members = Members(recipe, settings)
    steps: list[MergePlan | MakePlan | EvaluatePlan] = []
    warnings: list[str] = []
    for step in recipe.steps:
        if isinstance(step, EvaluateStep):
            adapters = _adapters(steps)
            steps.append(_plan_evaluation(step, recipe, members, adapters, settings))
            continue
        if isinstance(step, MakeStep):
            _check_whole(step, _adapters(steps))
            made = plan_make(step, members.of(step), recipe, settings)
            check_licences(made, settings)
            members.planned[step.name] = Member(step.name, made.as_checkpoint())
            steps.append(made)
            continue
        chosen = members.of(step)
        for member in chosen.values():
            _check_stock(member, step)
        _check_untrained(step, steps)
        plan = plan_merge(step, chosen, settings, planned=any(m.name in members.planned for m in chosen.values()))
        check_licences(plan, settings)
        members.planned[step.name] = Member(step.name, plan.as_checkpoint())
        steps.append(plan)
        warnings += [f"{step.name}: {w}" for w in plan.warnings]
    warnings += members.remarks()
    written = [s for s in steps if isinstance(s, MergePlan)]
    written += {p.key: p for s in steps if isinstance(s, EvaluatePlan) for p in s.folded.values()}.values()
    jobs = [job for plan in written for job in plan.jobs]
    workers, chunk = size_run(jobs, settings)
    disk = sum(plan.bytes_out for plan in written)
    disk += sum(plan.bytes_out for plan in steps if isinstance(plan, MakePlan))
    if out is not None:
        _check_disk(out, disk)
    return Plan(recipe, settings, steps, workers, chunk, disk, members, warnings)


class Members:
    """Every model that a recipe names, opened once; steps are added as they are planned or done."""

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self._recipe, self._settings = recipe, settings
        self._opened: dict[tuple[str, str], Member] = {}  # by name, and base for deltas that are named alone
        self.planned: dict[str, Member] = {}

    def of(self, step: MergeStep | MakeStep) -> Mapping[str, Member]:
        """The members that a step names, under the names that it uses; those of a step that runs one by their roles."""
        if isinstance(step, MakeStep):
            return {role: self.get(name) for role, name in step.models.items()}
        return {name: self.get(name, step.base if name != step.base else None) for name in step.references}

    def get(self, name: str, base: str | None = None) -> Member:
        """The model of a name; a delta alone is one on `base`, if there is a base.

        Raises:
            UserError: what opening raises; RG309 for a delta on what a step makes.
        """
        if name in self.planned:
            return self.planned[name]
        if (name, "") in self._opened:
            return self._opened[name, ""]
        if (name, base or "") not in self._opened:
            reference = self._recipe.models.get(name, name)
            try:
                self._opened[name, ""] = Member(name, self._open(reference))
                return self._opened[name, ""]
            except UserError as error:
                if error.code != "RG113" or base is None:
                    raise
            if base in self.planned:
                what = f"{name} is a delta, and cannot be put on what the step {base} makes"
                raise UserError("RG309", what, where=reference, fix=f"write {name} as base+delta")
            origin = self._recipe.models.get(base, base)
            self._opened[name, base] = Member(name, self._open(f"{origin}+{reference}"))
        return self._opened[name, base or ""]

    def _open(self, reference: str) -> Checkpoint:
        folder = self._recipe.path.parent if self._recipe.path else None
        settings = self._settings
        return open_checkpoint(reference, relative_to=folder, offline=settings.offline, force=settings.force)

    def afresh(self) -> Members:
        """The same opened models, before any step."""
        new = Members(self._recipe, self._settings)
        new._opened = self._opened
        return new

    def remarks(self) -> list[str]:
        return [f"{m.name}: {remark}" for m in self._opened.values() for remark in m.checkpoint.remarks]


def size_run(jobs: list[Job], settings: Settings) -> tuple[int, int]:
    """(workers, chunk) within the limits that the user sets."""
    if not all_compiled(jobs, settings.device):
        usable_device(settings.device)  # which imports torch, so that its memory is counted below
    workers, chunk = settings.workers or default_workers(), settings.chunk or default_chunk(settings.device)
    if settings.max_memory is not None:
        room = max(0, settings.max_memory - process_memory() - RUN_BYTES)
        workers, chunk = fit_memory(jobs, room, workers=workers, chunk=chunk)
    return workers, chunk


def _adapters(steps: Iterable[MergePlan | MakePlan | EvaluatePlan]) -> list[str]:
    """The names of steps whose results are adapters."""
    return [
        p.step.name
        for p in steps
        if (isinstance(p, MergePlan) and p.combination is not None) or (isinstance(p, MakePlan) and p.makes_adapter)
    ]


def _check_whole(step: MakeStep, adapters: Collection[str]) -> None:
    """Raise RG602 for a model of a step that is an adapter."""
    for name in step.models.values():
        if name in adapters:
            what = f"{name} is an adapter, which has no folder of a whole model"
            fix = "make it without output: lora, or lora_output: adapter"
            raise UserError("RG602", what, where=step.where, fix=fix)


def _check_untrained(step: MergeStep, steps: Iterable[MergePlan | MakePlan | EvaluatePlan]) -> None:
    """Raise RG309 for a model of a merge that is an adapter which the recipe trains."""
    trained = [p.step.name for p in steps if isinstance(p, MakePlan) and p.makes_adapter]
    for name in step.references:
        if name in trained:
            what = f"{name} is an adapter that is not there before this run has trained it"
            fix = "make it with lora_output: merged, or merge base+adapter by a recipe of its own"
            raise UserError("RG309", what, where=step.where, fix=fix)


def _check_stock(member: Member, step: MergeStep) -> None:
    """Raise RG309 for a model whose modules are not those of its architecture: factors of two models do not align."""
    kept = member.checkpoint.config.get("regraft")
    if isinstance(kept, Mapping) and kept.get("planned") == "train":
        what = f"{member.name} gets a new head or size, so that its tensors are not known before it is trained"
        fix = "merge it by a recipe of its own, when it is there"
        raise UserError("RG309", what, where=step.where, fix=fix)
    if isinstance(kept, Mapping) and (kept.get("surgeries") or kept.get("planned")):
        what = f"{member.name} is a compressed model, and its factors cannot be merged with those of another"
        raise UserError("RG309", what, where=step.where, fix="merge first and compress then, or use: regraft export")


def check_licences(plan: MergePlan | MakePlan, settings: Settings) -> None:
    """Raise RG404 for licences that do not go together, unless accepted."""
    if plan.licence.conflicts and not settings.accept_licenses:
        what = "the licences of the inputs do not agree: " + "; ".join(plan.licence.conflicts)
        raise UserError("RG404", what, where=plan.step.where, fix="if you may combine them, add --accept-licenses")


def fold(name: str, step: EvaluateStep) -> MergeStep:
    """The step that writes a model with adapters or deltas as a folder of its own."""
    return MergeStep(name, "passthrough", None, (Input(name),), where=step.where)


def _plan_evaluation(
    step: EvaluateStep, recipe: Recipe, members: Members, adapters: Collection[str], settings: Settings
) -> EvaluatePlan:
    metric = method("evaluate", step.metric, where=step.where)
    folded = {}
    for name in step.models:
        if name not in members.planned:
            if members.get(name).checkpoint.adapters:
                folded[name] = plan_merge(fold(name, step), {name: members.get(name)}, settings)
        elif name in adapters:
            what = f"{name} is an adapter, which has no folder of a whole model"
            fix = "make it without output: lora, or lora_output: adapter, and evaluate that step"
            raise UserError("RG602", what, where=step.where, fix=fix)
    folder = recipe.path.parent if recipe.path else Path()
    data = (folder / Path(step.data).expanduser()) if step.data else None
    if (data is None and metric.data == "needed") or (data is not None and not data.exists()):
        raise UserError("RG601", f"no data at {step.data!r}", where=step.where, fix="give the path of a data file")
    given = dict(step.options)
    for name in metric.files:
        if name in given:
            path = folder / Path(str(given[name])).expanduser()
            if not path.exists():
                what = f"no data at {given[name]!r}, which {name} names"
                raise UserError("RG601", what, where=step.where, fix="give the path of a data file")
            given[name] = str(path)
    options = metric.resolve(given, where=step.where)
    metric.check(data, options)
    return EvaluatePlan(step, metric, options, data, step.models, folded)


def _check_disk(out: Path, need: int) -> None:
    parent = next((p for p in [out, *out.absolute().parents] if p.exists()), Path.cwd())
    # What runs that did not end hold is used, or given back, by the next one.
    kept = [
        folder for where in (out, out.with_name(out.name + ".steps")) for folder in unfinished_in(where / "artefacts")
    ]
    free = shutil.disk_usage(parent).free + sum(reserved(folder) for folder in [out, *kept])
    if need > free:
        what = f"the outputs need {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        raise UserError("RG402", what, where=str(out), fix="free some space or name an output on another disk")
