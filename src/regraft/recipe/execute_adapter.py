"""A planned merge of adapters, done: one folder that PEFT loads, published whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from regraft.adapters.extract import FACTORS
from regraft.adapters.folder import WEIGHTS
from regraft.adapters.publish import summary, write
from regraft.checkpoint import Checkpoint, read_safetensors
from regraft.checkpoint.adapter import apply
from regraft.checkpoint.card import AdapterFacts
from regraft.checkpoint.job_folder import JobFolder
from regraft.checkpoint.lineage import Lineage
from regraft.checkpoint.output import remove
from regraft.recipe.document import Recipe
from regraft.recipe.execute import begin, depends_on, title
from regraft.recipe.merge_plan import MergePlan
from regraft.recipe.progress import Progress
from regraft.recipe.settings import Settings


def write_adapter(plan: MergePlan, out: Path, recipe: Recipe, settings: Settings, progress: Progress) -> Lineage:
    """Make the adapter of a plan at `out`.

    Raises:
        UserError: RG206 for values that are not finite, RG401, RG402 and RG405 for the output.
    """
    combination = plan.combination
    assert combination is not None
    lineage = begin(plan, recipe)
    cut = plan.step.cut
    lineage.settings |= {"output": "lora", "cut": asdict(cut) if cut else None}
    work = depends_on(plan, settings) | {"cut": lineage.settings["cut"]}
    with JobFolder(out, combination.parts, work, force=settings.force, need_bytes=plan.bytes_out) as folder:
        adapter, changes = combination.run(progress.advance, folder)
        remove(folder.staging / FACTORS)
        lineage.warnings = [*plan.warnings, *combination.remarks]
        n = len(plan.inputs)
        sentence = f"{n} LoRA adapter{'s' if n > 1 else ''} of one base merged into one by `{plan.rule.name}`."
        write(
            folder.staging,
            adapter,
            [m.checkpoint for m in plan.parents],
            lineage,
            changes,
            AdapterFacts(combination.base, adapter.skeleton.class_name, sentence),
            name=title(plan, out),
            recipe=recipe.text,
            registered=plan.rule,
        )
        folder.publish()
    found = summary(changes)
    how = "cut off" if cut else "exact"
    progress.message(
        f"{plan.step.name}: {how}, relative error {found['relative_error']:.3g}, rank up to {found['largest_rank']}"
    )
    for warning in lineage.warnings:
        progress.message(f"note: {plan.step.name}: {warning}")
    return lineage


def open_result(plan: MergePlan, folder: Path) -> Checkpoint:
    """The result of a step that makes an adapter, as a model.

    Raises:
        UserError: the folder holds no such adapter.
    """
    assert plan.combination is not None
    return apply(plan.combination.base, folder, str(folder))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter whose file is whole.

    Raises:
        UserError: RG103 for a damaged one.
    """
    path = folder / WEIGHTS
    return path.exists() and bool(read_safetensors(path)[0])
