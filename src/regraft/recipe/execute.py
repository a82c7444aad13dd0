"""One planned merge, done: weights stream into a staging folder, everything else joins them, one rename publishes.

What was finished when a run was killed or stopped is taken over by the same run (see `checkpoint.writer`). Only weights
are: sidecars, card and lineage are made again, so that the files of an interrupted run are those of an uninterrupted
one to the byte, except for the date, time and memory that regraft.json and the card tell of the last run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regraft.checkpoint.card import write_card
from regraft.checkpoint.dtypes import main_dtype, torch_name
from regraft.checkpoint.lineage import InputRecord, Lineage, Output, fold_names, group_options
from regraft.checkpoint.output import DISK_FULL
from regraft.checkpoint.sidecars import copy_licences, copy_sidecars
from regraft.checkpoint.surroundings import surroundings
from regraft.checkpoint.writer import ModelWriter
from regraft.errors import UserError, UserWarningMessage
from regraft.merge.diagnostics import TaskVectorStatistics
from regraft.merge.engine import Outcome, run_jobs
from regraft.recipe.document import STATE_DICT, Recipe
from regraft.recipe.merge_plan import MergePlan, options_of
from regraft.recipe.progress import Progress
from regraft.recipe.settings import Settings

# Switches that change how a run goes and never what it writes. All others are part of what makes a run the same.
_INDIFFERENT = ("offline", "force", "accept_licenses", "workers", "chunk", "max_memory", "sync")


def execute(
    plan: MergePlan, out: Path, recipe: Recipe, settings: Settings, *, workers: int, chunk: int, progress: Progress
) -> Lineage:
    """Make the model of a plan at `out`.

    Raises:
        UserError: RG206 for values that are not finite, RG402 and RG405 for the output, which leave nothing; RG401 for
            an output that is taken, RG101 and RG103 for a source that is gone, changed or cannot be read.
        KeyboardInterrupt: with a sentence, if finished tensors are kept for the next run.
    """
    lineage = begin(plan, recipe)
    # Where slices or modules have models of their own, figures per model would speak of different tensors.
    collector = TaskVectorStatistics(len(plan.inputs)) if plan.rule.needs_base and plan.uniform else None
    with (
        warnings.catch_warnings(record=True) as remarks,
        ModelWriter(
            out,
            plan.specs,
            shard_bytes=settings.shard_bytes,
            force=settings.force,
            sync=settings.sync,
            depends_on=depends_on(plan, settings),
        ) as writer,
    ):
        warnings.simplefilter("always", UserWarningMessage)
        if writer.finished:
            done = f"{len(writer.finished)} of {len(plan.specs)} tensors"
            progress.message(f"{plan.step.name}: {done} are there from a run that did not end")
        parents = [m.checkpoint for m in plan.parents]
        with _readable():
            copy_sidecars(
                writer.staging,
                config_from=plan.config_from,
                tokenizer_from=plan.tokenizer_from,
                config_changes=plan.config_changes,
                dtype=_main_dtype(plan),
                chat_template=plan.step.chat_template,
                tokenizer_json=plan.vocabulary.tokenizer_json if plan.vocabulary is not None else None,
                generation_changes=plan.generation_changes,
            )
            copy_licences(writer.staging, parents)
        outcome = run_jobs(
            plan.jobs,
            writer.write,
            workers=workers,
            chunk=chunk,
            device=settings.device,
            allow_nan=settings.allow_nan,
            observer=collector,
            on_progress=progress.advance,
            finished=writer.finished,
            on_finished=writer.finish,
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
        write_card(
            writer.staging,
            lineage,
            parents,
            recipe=recipe.text,
            name=title(plan, out),
            registered=plan.rule,
            bare=plan.step.output == STATE_DICT,
        )
        writer.publish()
    if found := lineage.diagnostics.get("independence"):
        conflict = lineage.diagnostics["sign_conflict"]
        progress.message(f"{plan.step.name}: {found}; {conflict:.0%} of the changes conflict in sign")
    for warning in lineage.warnings:
        progress.message(f"note: {plan.step.name}: {warning}")
    return lineage


def depends_on(plan: MergePlan, settings: Settings) -> dict[str, Any]:
    """Everything that the weights and the facts told of them depend on, JSON-able.

    The content key covers contents and options. Added to it is what may differ between two runs of one key: names of
    models in messages, switches, and what `surroundings` tells.
    """
    names = [[m.name, m.checkpoint.ref] for m in plan.parents]
    switches = {name: value for name, value in asdict(settings).items() if name not in _INDIFFERENT}
    around = surroundings(m.checkpoint for m in (*plan.parents, plan.template))
    return {"key": plan.key, "names": names, "switches": switches, **around}


@contextmanager
def _readable() -> Iterator[None]:
    """Within it, files of models are copied: a sentence for one that has gone or cannot be read."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL or error.filename is None:
            raise
        what, fix = f"the file cannot be read: {error.strerror}", "run again with it in place"
        raise UserError("RG101", what, where=str(error.filename), fix=fix) from error


def begin(plan: MergePlan, recipe: Recipe) -> Lineage:
    """What is known of a merge before it is done."""
    roles = {m.name: "base" for m in (plan.base, *plan.bases) if m is not None}
    made = {"output": plan.step.output} if plan.step.output == STATE_DICT else {}
    merged = {j.info.name: options for j in plan.jobs if (options := options_of(j)) is not None}
    copied = [j.info.name for j in plan.jobs if j.rule is None]
    return Lineage(
        step=plan.step.name,
        method=plan.rule.name,
        recipe=recipe.text,
        recipe_language=plan.step.dialect,
        key=plan.key,
        inputs=[InputRecord.sampled(m.checkpoint, m.name, roles.get(m.name, "model")) for m in plan.parents],
        settings={
            "dtype": plan.step.dtype,
            "out_dtype": plan.step.out_dtype,
            "exclude": list(plan.step.exclude),
            **made,
        },
        options=group_options(merged),
        copied=fold_names(copied),
        seeds={"merge": plan.seed},
        sources={"config": plan.template.name, "tokenizer": _tokenizer_source(plan)},
        vocabulary=dict(plan.vocabulary.report) if plan.vocabulary is not None else {},
        output=Output(
            tensors=len(plan.specs),
            parameters=sum(j.info.numel for j in plan.jobs),
            bytes=plan.bytes_out,
            dtype=_main_dtype(plan),
        ),
        licence=plan.licence.licence,
    )


def _tokenizer_source(plan: MergePlan) -> str:
    if plan.vocabulary is not None:
        return plan.vocabulary.giver.name
    return plan.step.tokenizer_from or plan.template.name


def _main_dtype(plan: MergePlan) -> str:
    """What the configuration says."""
    return torch_name(main_dtype((job.out_dtype, job.info.numel) for job in plan.jobs))


def _remarks(outcome: Outcome, settings: Settings) -> list[str]:
    found = list(outcome.warnings)
    for name, count in outcome.saturated.items():
        found.append(f"{count} values of {name} are beyond the range of the output dtype: choose a wider out_dtype")
    for model, tensors in outcome.non_finite.items():
        total: Any = sum(tensors.values())
        found.append(f"{model} holds {total} values that are not finite, in {len(tensors)} tensors; they were merged")
    return found


def title(plan: MergePlan, out: Path) -> str:
    """What the card calls the result."""
    return plan.step.name if out.parent.name == "artefacts" else out.name
