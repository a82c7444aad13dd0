"""Planning a merge step that makes an adapter (`output: lora`): all models are adapters of one base."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regraft.adapters.merged import Combination, Computing
from regraft.checkpoint import Checkpoint, Ref, parse_ref
from regraft.checkpoint.dtypes import DTYPES
from regraft.checkpoint.model import open_local
from regraft.errors import UserError
from regraft.merge.jobs import Job, scope_option
from regraft.merge.rule import Rule
from regraft.recipe.document import MergeStep
from regraft.recipe.fit import Member
from regraft.recipe.planned import PlannedCheckpoint
from regraft.recipe.settings import Settings


def combine_adapters(
    step: MergeStep,
    rule: Rule[Any],
    template: Member,
    base: Member | None,
    inputs: Sequence[Member],
    jobs: Sequence[Job],
    settings: Settings,
) -> Combination:
    """The planned merge of whole models as one of their adapters.

    Raises:
        UserError: RG309 for models that are not adapters of one base, for rules that change the base itself or look at
            the whole model, for slices, and for what `Combination` refuses.
    """
    origin = _base_of(step, base, inputs)
    fix = "leave out output: lora, or use linear or task_arithmetic"
    if step.slices:
        raise UserError("RG309", "slices make another base, which no adapter fits", where=step.where, fix=fix)
    for job in jobs:
        if job.scope != "tensor":
            what = f"{rule.name} looks at the whole model at once, and adapters are merged tensor by tensor"
            option = scope_option(rule)
            raise UserError("RG309", what, where=step.where, fix=f"add {option}: tensor" if option else fix)
        fixed = job.rule is None or (rule.combination is not None and rule.combination(job.options) is not None)
        if not fixed and not rule.needs_base:
            why = "changes the base itself, which an adapter leaves as it is"
            if rule.combination is not None:
                why, fix = f"with weights that do not add up to 1 {why}", "add normalize: true"
            raise UserError("RG309", f"{rule.name} {why}", where=step.where, fix=fix)
    dtype = DTYPES[jobs[0].out_dtype] if step.out_dtype or step.dtype else None
    how = Computing(settings.workers, settings.device, settings.allow_nan)
    return Combination(origin, template.checkpoint, jobs, step.cut, dtype=dtype, how=how, where=step.where)


def _base_of(step: MergeStep, base: Member | None, inputs: Sequence[Member]) -> Checkpoint:
    """The one base of all models, without adapters."""
    first = inputs[0].checkpoint
    fix = "write each model as base+adapter, on one base"
    for member in inputs:
        one = member.checkpoint
        if isinstance(one, PlannedCheckpoint) or not one.adapters:
            what = f"{member.name} is a whole model, and output: lora merges adapters"
            raise UserError("RG309", what, where=step.where, fix=fix)
        if _origin(one) != _origin(first):
            what = f"{member.name} and {inputs[0].name} are adapters of different bases"
            raise UserError("RG309", what, where=step.where, fix=fix)
    if base is not None and (_origin(base.checkpoint) != _origin(first) or base.checkpoint.adapters):
        what = f"{base.name} is not the base of the adapters"
        raise UserError("RG309", what, where=step.where, fix="name the model before the + as base")
    if base is not None:
        return base.checkpoint
    ref = parse_ref(first.ref)
    file = first.path / Path(ref.model).name
    plain = open_local(file if file.is_file() else first.path)
    name = str(Ref(ref.model, ref.revision))
    return dataclasses.replace(plain, ref=name, repo_id=first.repo_id, revision=first.revision)


def _origin(checkpoint: Checkpoint) -> tuple[Path, str]:
    return checkpoint.path.resolve(), checkpoint.revision
