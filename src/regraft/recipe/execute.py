"""One planned merge, done: weights stream into a staging folder, everything else joins them, one rename publishes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from regraft.checkpoint.card import write_card
from regraft.checkpoint.licences import read_licence
from regraft.checkpoint.lineage import InputRecord, Lineage, Output, fold_names, group_options
from regraft.checkpoint.sidecars import copy_licences, copy_sidecars
from regraft.checkpoint.writer import ModelWriter
from regraft.errors import UserWarningMessage
from regraft.merge.diagnostics import TaskVectorStatistics
from regraft.merge.engine import Outcome, run_jobs
from regraft.recipe.document import Recipe
from regraft.recipe.merge_plan import MergePlan
from regraft.recipe.progress import Progress
from regraft.recipe.settings import Settings


def execute(
    plan: MergePlan, out: Path, recipe: Recipe, settings: Settings, *, workers: int, chunk: int, progress: Progress
) -> Lineage:
    """Make the model of a plan at `out`.

    Raises:
        UserError: RG206 for values that are not finite, RG401, RG402, RG405 for the output; nothing is left then.
    """
    lineage = _begin(plan, recipe)
    collector = TaskVectorStatistics(len(plan.inputs)) if plan.rule.needs_base else None
    with (
        warnings.catch_warnings(record=True) as remarks,
        ModelWriter(out, plan.specs, shard_bytes=settings.shard_bytes, force=settings.force) as writer,
    ):
        warnings.simplefilter("always", UserWarningMessage)
        copy_sidecars(
            writer.staging,
            config_from=plan.config_from,
            tokenizer_from=plan.tokenizer_from,
            config_changes=plan.config_changes,
            dtype=_main_dtype(plan),
            chat_template=plan.step.chat_template,
        )
        parents = [m.checkpoint for m in plan.parents]
        copy_licences(writer.staging, parents)
        outcome = run_jobs(
            plan.jobs,
            writer.write,
            workers=workers,
            chunk=chunk,
            allow_nan=settings.allow_nan,
            observe=collector.observe if collector else None,
            on_progress=progress.advance,
        )
        lineage.notes = outcome.notes
        lineage.warnings = [
            *plan.warnings,
            *_remarks(outcome, settings),
            *(str(w.message) for w in remarks if issubclass(w.category, UserWarningMessage)),
        ]
        if collector is not None:
            lineage.diagnostics = collector.summary([m.name for m in plan.inputs])
        lineage.finish()
        lineage.write(writer.staging)
        write_card(writer.staging, lineage, parents, recipe=recipe.text, name=_title(plan, out), registered=plan.rule)
        writer.publish()
    if found := lineage.diagnostics.get("independence"):
        conflict = lineage.diagnostics["sign_conflict"]
        progress.message(f"{plan.step.name}: {found}; {conflict:.0%} of the changes conflict in sign")
    for warning in lineage.warnings:
        progress.message(f"note: {plan.step.name}: {warning}")
    return lineage


def _begin(plan: MergePlan, recipe: Recipe) -> Lineage:
    roles = {plan.base.name: "base"} if plan.base is not None else {}
    merged = {j.info.name: j.options.model_dump(mode="json", by_alias=True) for j in plan.jobs if j.rule and j.options}
    copied = [j.info.name for j in plan.jobs if j.rule is None]
    return Lineage(
        step=plan.step.name,
        method=plan.rule.name,
        recipe=recipe.text,
        recipe_language=plan.step.dialect,
        key=plan.key,
        inputs=[
            InputRecord.of(
                m.checkpoint,
                m.name,
                role=roles.get(m.name, "model"),
                digest=m.checkpoint.digest(),
                digest_kind="sampled",
                licence=", ".join(read_licence(m.checkpoint).ids) or None,
            )
            for m in plan.parents
        ],
        settings={"dtype": plan.step.dtype, "out_dtype": plan.step.out_dtype, "exclude": list(plan.step.exclude)},
        options=group_options(merged),
        copied=fold_names(copied),
        seeds={"merge": plan.seed},
        sources={"config": plan.template.name, "tokenizer": plan.step.tokenizer_from or plan.template.name},
        output=Output(
            tensors=len(plan.specs),
            parameters=sum(j.info.numel for j in plan.jobs),
            bytes=plan.bytes_out,
            dtype=str(_main_dtype(plan)).removeprefix("torch."),
        ),
        licence=plan.licence.licence,
    )


def _main_dtype(plan: MergePlan) -> torch.dtype:
    """The dtype of most of the weights: what the configuration says."""
    sizes: dict[torch.dtype, int] = {}
    for job in plan.jobs:
        if job.out_dtype.is_floating_point:
            sizes[job.out_dtype] = sizes.get(job.out_dtype, 0) + job.info.numel
    return max(sizes, key=lambda d: sizes[d]) if sizes else torch.float32


def _remarks(outcome: Outcome, settings: Settings) -> list[str]:
    found = list(outcome.warnings)
    for name, count in outcome.saturated.items():
        found.append(f"{count} values of {name} are beyond the range of the output dtype: choose a wider out_dtype")
    for model, tensors in outcome.non_finite.items():
        total: Any = sum(tensors.values())
        found.append(f"{model} holds {total} values that are not finite, in {len(tensors)} tensors; they were merged")
    return found


def _title(plan: MergePlan, out: Path) -> str:
    return plan.step.name if out.parent.name == "artefacts" else out.name
