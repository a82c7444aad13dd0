"""`regraft merge`: a recipe that makes one model, and where to put it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.plan import show_plan
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal
from regraft.cli.words import size_in_words

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the model; it must not exist, or be empty.")]


def merge(
    terminal: Terminal,
    recipe: opt.RecipePath,
    out: Out,
    assignments: opt.Assignments = [],  # noqa: B006 - typer copies it
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    force: opt.Force = False,
    allow_nan: opt.AllowNan = False,
    accept_licenses: opt.AcceptLicenses = False,
    offline: opt.Offline = False,
    workers: opt.Workers = None,
    chunk: opt.Chunk = None,
    max_memory: opt.MaxMemory = None,
    shard_size: opt.ShardSize = opt.DEFAULT_SHARD,
    seed: opt.Seed = None,
) -> None:
    """Merge models by a recipe into one model that from_pretrained loads."""
    settings = opt.settings(
        force=force,
        allow_nan=allow_nan,
        accept_licenses=accept_licenses,
        offline=offline,
        workers=workers,
        chunk=chunk,
        max_memory=max_memory,
        shard_size=shard_size,
        seed=seed,
    )
    document = opt.read_recipe(recipe, assignments)
    if dry_run or terminal.verbose:
        from regraft.recipe.run import check_merge

        planned = check_merge(document, out, settings).to_dict()
        if dry_run and as_json:
            terminal.json(planned)
        else:
            show_plan(terminal, terminal.out if dry_run else terminal.err, planned)
        if dry_run:
            return
    from regraft.checkpoint.lineage import Lineage
    from regraft.recipe.run import merge as merge_recipe

    with TerminalProgress(terminal) as progress:
        folder = merge_recipe(document, out, settings, progress)
    lineage = Lineage.read(folder)
    if as_json:
        facts = {"step", "method", "key", "output", "licence", "wall_seconds", "peak_memory_bytes", "warnings"}
        terminal.json({"out": str(folder), **lineage.model_dump(mode="json", include=facts)})
        return
    output = lineage.output
    sizes = f"{output.tensors} tensors, {size_in_words(output.bytes)}, {output.dtype}, " if output else ""
    if not terminal.quiet:
        memory = f"peak memory {size_in_words(lineage.peak_memory_bytes or 0)}"
        terminal.out.print(f"{folder}: {lineage.method}, {sizes}{memory}", markup=False)
