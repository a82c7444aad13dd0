"""`regraft extract-lora`: what distinguishes a fine-tune from its base, as an adapter that PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli import options as opt
from regraft.cli.adapter_table import adapter_in_words, show_changes
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tune: a folder, a file, or a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the adapter; it must not exist, or be empty.")]
Base = Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that it was fine-tuned from.")]
Include = Annotated[
    list[str],
    typer.Option("--include", metavar="REGEX", help="Adapt only tensors whose names it matches; may be repeated."),
]
Exclude = Annotated[
    list[str],
    typer.Option("--exclude", metavar="REGEX", help="Leave these tensors as they are in the base; may be repeated."),
]
SaveModules = Annotated[
    list[str],
    typer.Option(
        "--save-modules", metavar="NAME",
        help="Save whole modules whose paths end so; 'bias' for biases of layers, 'all' for whatever changed and "
        "cannot be of low rank; may be repeated.",
    ),
]  # fmt: skip
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Factors for embeddings, too.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="DTYPE", help="Of the factors: float32, float16, bfloat16; the model's if not given."
    ),
]


def extract_lora(
    terminal: Terminal,
    model: Model,
    out: Out,
    base: Base,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    max_rank: opt.MaxRank = None,
    include: Include = [],  # noqa: B006 - typer copies it
    exclude: Exclude = [],  # noqa: B006
    save_modules: SaveModules = [],  # noqa: B006
    embeddings: Embeddings = False,
    dtype: Dtype = None,
    as_json: opt.Json = False,
    force: opt.Force = False,
    accept_licenses: opt.AcceptLicenses = False,
    offline: opt.Offline = False,
) -> None:
    """Write the difference between a fine-tune and its base as a LoRA adapter, and measure what it keeps."""
    from regraft.adapters.extract import Wanted, factor_dtype
    from regraft.adapters.factors import Truncation
    from regraft.adapters.publish import extract_lora as extract
    from regraft.checkpoint import open_checkpoint

    wanted = Wanted(Truncation(rank, energy, max_rank), include, exclude, save_modules, embeddings, factor_dtype(dtype))
    with TerminalProgress(terminal) as progress:
        progress.step("extracting")
        made = extract(
            open_checkpoint(model, offline=offline, force=force),
            open_checkpoint(base, offline=offline, force=force),
            out,
            wanted,
            force=force,
            accept_licenses=accept_licenses,
            on_progress=progress.advance,
        )
    terminal.interrupted = f"{made.out} is finished"
    for remark in made.lineage.warnings:
        terminal.note(remark)
    found = made.to_dict()
    if as_json:
        terminal.json(found)
    elif not terminal.quiet:
        show_changes(terminal, found["tensors"])
        terminal.out.print(adapter_in_words(made.out, found, found["output"]), markup=False)
