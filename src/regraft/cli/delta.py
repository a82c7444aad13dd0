"""`regraft delta`: what fine-tuning changed as a file of its own; made, put back on its base, and looked at."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal, command
from regraft.cli.words import size_in_words


class Kind(str, Enum):
    """How differences are stored; `regraft.checkpoint.delta_record.KINDS`, without its imports."""

    dense = "dense"
    sparse = "sparse"
    bits = "bits"


Model = Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tune: a folder, a file, or a Hub id.")]
Folder = Annotated[Path, typer.Argument(metavar="DELTA", help="A folder that regraft delta extract made.")]
DeltaOut = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the delta; it must not exist, or be empty.")]
ModelOut = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the model; it must not exist, or be empty.")]
Base = Annotated[str, typer.Option("--base", metavar="BASE", help="The model that the fine-tune was made from.")]
OwnBase = Annotated[str, typer.Option("--base", metavar="BASE", help="The model that the delta was made from.")]
HowStored = Annotated[
    Kind,
    typer.Option(
        "--kind", help="dense: all differences, exact; sparse: the largest; bits: their signs and a scale per matrix."
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density", metavar="SHARE", help="Of the entries of each tensor, for --kind sparse; 0.1 if not given."
    ),
]
Scale = Annotated[float, typer.Option("--scale", metavar="NUMBER", help="Multiply the differences by this.")]
ForceExtract = Annotated[
    bool,
    typer.Option("--force", help="Replace an output that exists; go on if the model is no fine-tune of the base."),
]
ForceApply = Annotated[
    bool, typer.Option("--force", help="Replace an output that exists; go on with another base, and say how far it is.")
]
Offline = opt.Offline

delta = typer.Typer(no_args_is_help=True, help="Store what fine-tuning changed, and add it to its base again.")


def extract(
    terminal: Terminal,
    model: Model,
    out: DeltaOut,
    base: Base,
    kind: HowStored = Kind.dense,
    density: Density = None,
    force: ForceExtract = False,
    offline: Offline = False,
    as_json: opt.Json = False,
) -> None:
    """Store the difference between a fine-tune and its base, and measure what comes back."""
    from regraft.checkpoint import open_checkpoint
    from regraft.deltas.apply import open_delta
    from regraft.deltas.extract import extract as extract_delta

    tuned, origin = (open_checkpoint(ref, offline=offline, force=force) for ref in (model, base))
    with TerminalProgress(terminal) as progress:
        progress.step("extracting")
        made = extract_delta(tuned, origin, out, kind.value, density=density, force=force, on_progress=progress.advance)
    terminal.interrupted = f"{out} is finished"
    size = open_delta(out).bytes
    if as_json:
        terminal.json({"out": str(out), "bytes": size, **made.summary()})
    elif not terminal.quiet:
        figures = f"{made.exact:.4%} of the entries exact, relative error {made.relative_error:.3g}"
        text = (
            f"{out}: {kind.value} delta, {size_in_words(size)} for a model of {size_in_words(tuned.bytes)}, {figures}"
        )
        terminal.out.print(text, markup=False)


def apply(
    terminal: Terminal,
    folder: Folder,
    out: ModelOut,
    base: OwnBase,
    scale: Scale = 1.0,
    force: ForceApply = False,
    offline: Offline = False,
    as_json: opt.Json = False,
) -> None:
    """Add a delta to its base: a model that from_pretrained loads."""
    from regraft.checkpoint import open_checkpoint
    from regraft.deltas.apply import apply as apply_delta
    from regraft.deltas.apply import open_delta

    opened, origin = open_delta(folder), open_checkpoint(base, offline=offline, force=force)
    with TerminalProgress(terminal) as progress:
        progress.step("applying")
        lineage = apply_delta(opened, origin, out, scale=scale, force=force, on_progress=progress.advance)
    terminal.interrupted = f"{out} is finished"
    for remark in lineage.warnings:
        terminal.note(remark)
    facts = lineage.model_dump(mode="json", include={"output", "licence", "wall_seconds", "warnings"})
    if as_json:
        terminal.json({"out": str(out), "scale": scale, **facts})
    elif not terminal.quiet:
        output = facts["output"]
        sizes = f"{output['tensors']} tensors, {size_in_words(output['bytes'])}, {output['dtype']}"
        terminal.out.print(f"{out}: {origin.ref} + {scale:g} x {folder}, {sizes}", markup=False)


def show(terminal: Terminal, folder: Folder, as_json: opt.Json = False) -> None:
    """Show what a delta is, of which base, and how well it gives the fine-tune back; weights are not read."""
    from regraft.deltas.apply import open_delta

    opened = open_delta(folder)
    if as_json:
        terminal.json({"bytes": opened.bytes, **opened.record.model_dump(mode="json")})
    else:
        from regraft.cli.stored_delta_table import show_delta

        show_delta(terminal, str(folder), opened.record, opened.bytes)


for function in (extract, apply, show):
    delta.command()(command(function))
