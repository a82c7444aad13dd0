"""Recipe -> plan: everything is opened, checked and sized before work starts; of the weights, only samples are read."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from regraft.checkpoint import open_checkpoint
from regraft.checkpoint.output import reserved, unfinished_in
from regraft.errors import UserError
from regraft.merge.jobs import Job, default_chunk, default_workers, fit_memory, predict_memory, usable_device
from regraft.methods import Options, method
from regraft.recipe.document import EvaluateStep, MakeStep, MergeStep, Recipe
from regraft.recipe.estimate import estimate_seconds, process_memory
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
    data: Path
    models: tuple[str, ...]


@dataclass
class Plan:
    """All steps of a recipe, in order, with what they cost.

    `memory_bytes` is the peak of the whole process, `disk_bytes` the sum of all outputs.
    """

    recipe: Recipe
    settings: Settings
    steps: list[MergePlan | MakePlan | EvaluatePlan]
    workers: int
    chunk: int
    memory_bytes: int
    disk_bytes: int
    members: Members
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def seconds(self) -> float:
        """Estimated time for all merges, measured on samples when it is first asked for."""
        return sum(estimate_seconds(p.jobs, p.bytes_in + p.bytes_out, self.workers) for p in self.merges)

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
        return {"step": plan.step.name, "evaluate": plan.metric.name, "models": list(plan.models), "options": options}
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
        "dtypes": sorted({str(s.dtype).removeprefix("torch.") for s in plan.specs}),
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
            adapters = [p.step.name for p in steps if isinstance(p, MergePlan) and p.combination is not None]
            steps.append(_plan_evaluation(step, recipe, members, adapters))
            continue
        if isinstance(step, MakeStep):
            made = plan_make(step, members.of(step), recipe, settings)
            check_licences(made, settings)
            members.planned[step.name] = Member(step.name, made.as_checkpoint())
            steps.append(made)
            continue
        chosen = members.of(step)
        for member in chosen.values():
            _check_stock(member, step)
        plan = plan_merge(step, chosen, settings, planned=any(m.name in members.planned for m in chosen.values()))
        check_licences(plan, settings)
        members.planned[step.name] = Member(step.name, plan.as_checkpoint())
        steps.append(plan)
        warnings += [f"{step.name}: {w}" for w in plan.warnings]
    warnings += members.remarks()
    merges = [s for s in steps if isinstance(s, MergePlan)]
    jobs = [job for plan in merges for job in plan.jobs]
    workers, chunk, memory = size_run(jobs, settings)
    disk = sum(plan.bytes_out for plan in steps if not isinstance(plan, EvaluatePlan))
    if out is not None:
        _check_disk(out, disk)
    return Plan(recipe, settings, steps, workers, chunk, memory, disk, members, warnings)


class Members:
    """Every model that a recipe names, opened once; steps are added as they are planned or done."""

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        self._recipe, self._settings = recipe, settings
        self._opened: dict[str, Member] = {}
        self.planned: dict[str, Member] = {}

    def of(self, step: MergeStep | MakeStep) -> Mapping[str, Member]:
        """The members that a step names, under the names that it uses; those of a step that runs one by their roles."""
        if isinstance(step, MakeStep):
            return {role: self.get(name) for role, name in step.models.items()}
        names = [i.model for s in (step.slices or ()) for i in s.inputs] + [i.model for i in step.inputs]
        names += [n for n in (step.base, step.config_from, step.tokenizer_from) if n]
        return {name: self.get(name) for name in dict.fromkeys(names)}

    def get(self, name: str) -> Member:
        if name in self.planned:
            return self.planned[name]
        if name not in self._opened:
            reference = self._recipe.models.get(name, name)
            folder = self._recipe.path.parent if self._recipe.path else None
            checkpoint = open_checkpoint(reference, relative_to=folder, offline=self._settings.offline)
            self._opened[name] = Member(name, checkpoint)
        return self._opened[name]

    def afresh(self) -> Members:
        """The same opened models, before any step."""
        new = Members(self._recipe, self._settings)
        new._opened = self._opened
        return new

    def remarks(self) -> list[str]:
        return [f"{m.name}: {remark}" for m in self._opened.values() for remark in m.checkpoint.remarks]


def size_run(jobs: list[Job], settings: Settings) -> tuple[int, int, int]:
    """(workers, chunk, peak bytes of the process) within the limits that the user sets."""
    device = usable_device(settings.device)
    workers, chunk = settings.workers or default_workers(), settings.chunk or default_chunk(device)
    own = process_memory()
    if settings.max_memory is not None:
        workers, chunk = fit_memory(jobs, max(0, settings.max_memory - own), workers=workers, chunk=chunk)
    return workers, chunk, own + predict_memory(jobs, workers, chunk)


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


def _plan_evaluation(step: EvaluateStep, recipe: Recipe, members: Members, adapters: Collection[str]) -> EvaluatePlan:
    metric = method("evaluate", step.metric, where=step.where)
    for name in step.models:
        if name not in members.planned:
            members.get(name)
        elif name in adapters:
            what = f"{name} is an adapter, which has no folder of a whole model"
            fix = "merge it into its base in a step without output: lora, and evaluate that step"
            raise UserError("RG602", what, where=step.where, fix=fix)
    folder = recipe.path.parent if recipe.path else Path()
    data = (folder / Path(step.data).expanduser()) if step.data else folder
    if not step.data or not data.exists():
        raise UserError("RG601", f"no data at {step.data!r}", where=step.where, fix="give the path of a data file")
    options = metric.resolve(step.options, where=step.where)
    metric.check(data, options)
    return EvaluatePlan(step, metric, options, data, step.models)


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
