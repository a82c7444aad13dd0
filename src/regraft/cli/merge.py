"""`regraft merge`: a recipe that makes one model, and where to put it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.adapter_table import adapter_in_words, show_changes
from regraft.cli.mergekit_flags import with_mergekit_flags
from regraft.cli.plan import tell_plan
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal
from regraft.cli.words import size_in_words
from regraft.recipe.settings import Settings

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the model; it must not exist, or be empty.")]


Output = Annotated[
    str | None,
    typer.Option(
        "--output", metavar="KIND",
        help="model; lora: an adapter of adapters; state-dict: tensors alone; what the recipe says if not given.",
    ),
]  # fmt: skip


@opt.with_settings
@with_mergekit_flags
def merge(
    terminal: Terminal,
    recipe: opt.RecipePath,
    out: Out,
    assignments: opt.Assignments = [],  # noqa: B006 - typer copies it
    output: Output = None,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    max_rank: opt.MaxRank = None,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    *,
    settings: Settings,
) -> None:
    """Merge models by a recipe into one model that from_pretrained loads."""
    from regraft.recipe.stamp import Stamp
    from regraft.recipe.yaml_file import read_text

    text = read_text(recipe)
    shape = {"output": output, "rank": rank, "energy": energy, "max_rank": max_rank}
    changes = [*assignments, *(f"--{name}={value}" for name, value in shape.items() if value is not None)]
    stamp = Stamp("merge", recipe, text, changes, out, settings)
    if not (dry_run or terminal.verbose) and (told := stamp.result()) is not None:
        terminal.repeat(told["notes"])
        terminal.line(f"{out} is up to date")
        _show(terminal, out, told["model"], as_json)
        return
    from regraft.recipe import parse_recipe
    from regraft.recipe.run import with_output

    settings = opt.on_this_machine(settings)
    document = parse_recipe(text, path=recipe, changes=assignments)
    if any(value is not None for value in shape.values()):
        document = with_output(document, output, rank, energy, max_rank)
    stamp.watch(document)
    if dry_run or terminal.verbose:
        from regraft.recipe.run import check_merge

        tell_plan(terminal, check_merge(document, out, settings), dry_run=dry_run, as_json=as_json)
        if dry_run:
            return
    from regraft.checkpoint.lineage import Lineage
    from regraft.recipe.run import merge as merge_recipe

    if len(document.steps) > 1:
        terminal.interrupted = f"finished steps are kept in {out}.steps, and the same command goes on from there"
    with TerminalProgress(terminal) as progress:
        folder = merge_recipe(document, out, settings, progress)
    terminal.interrupted = f"{folder} is finished"
    facts = {"step", "method", "key", "output", "licence", "wall_seconds", "peak_memory_bytes", "warnings"}
    lineage = Lineage.read(folder)
    model = lineage.model_dump(mode="json", include=facts)
    if lineage.settings.get("output") == "lora":
        model["adapter"] = lineage.diagnostics
    terminal.unless_stamped(stamp.keep({"notes": terminal.notes, "model": model}))
    _show(terminal, folder, model, as_json)


def _show(terminal: Terminal, folder: Path, model: Mapping[str, Any], as_json: bool) -> None:
    """What came out, from the facts of its lineage."""
    if as_json:
        terminal.json({"out": str(folder), **model})
    elif not terminal.quiet and "adapter" in model:
        show_changes(terminal, model["adapter"]["tensors"])
        terminal.out.print(adapter_in_words(folder, model["adapter"], model["output"]), markup=False)
    elif not terminal.quiet:
        output = model["output"]
        sizes = f"{output['tensors']} tensors, {size_in_words(output['bytes'])}, {output['dtype']}, " if output else ""
        memory = f"peak memory {size_in_words(model['peak_memory_bytes'] or 0)}"
        terminal.out.print(f"{folder}: {model['method']}, {sizes}{memory}", markup=False)
