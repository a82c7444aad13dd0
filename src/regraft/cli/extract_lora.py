"""`regraft extract-lora`: what distinguishes a fine-tune from its base, as an adapter that PEFT loads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.delta_tables import number, share
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal
from regraft.cli.words import size_in_words

if TYPE_CHECKING:
    from rich.table import Table

    from regraft.adapters.publish import Made

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The fine-tune: a folder, a file, or a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the adapter; it must not exist, or be empty.")]
Base = Annotated[str, typer.Option("--base", metavar="MODEL", help="The model that it was fine-tuned from.")]
Rank = Annotated[
    int | None, typer.Option("--rank", metavar="N", help="Rank of the factors; 32 if --energy is not given either.")
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy", metavar="SHARE",
        help="The smallest rank that keeps this share of each tensor's squared change, such as 0.95.",
    ),
]  # fmt: skip
MaxRank = Annotated[
    int | None, typer.Option("--max-rank", metavar="N", help="No larger rank than this with --energy; 256.")
]
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
    rank: Rank = None,
    energy: Energy = None,
    max_rank: MaxRank = None,
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
            open_checkpoint(model, offline=offline),
            open_checkpoint(base, offline=offline),
            out,
            wanted,
            force=force,
            accept_licenses=accept_licenses,
            on_progress=progress.advance,
        )
    terminal.interrupted = f"{made.out} is finished"
    show_adapter(terminal, made, as_json)


def show_adapter(terminal: Terminal, made: Made, as_json: bool) -> None:
    """What an adapter keeps: in total, per group of tensors, with --verbose per tensor."""
    found = made.to_dict()
    if as_json:
        terminal.json(found)
        return
    if terminal.quiet:
        return
    terminal.out.print(_table(found["tensors"], each=terminal.verbose))
    output = found["output"]
    size = f"{output['tensors']} tensors, {size_in_words(output['bytes'])}, {output['dtype']}"
    error = f"relative error {number(found['relative_error'])}, energy {share(found['energy'])}"
    terminal.out.print(f"{made.out}: {error}, rank up to {found['largest_rank']}, {size}", markup=False)


def _table(tensors: Sequence[dict[str, Any]], *, each: bool) -> Table:
    """A row per tensor, or per group of tensors that differ in the numbers of their names."""
    from rich.table import Table
    from rich.text import Text

    table = Table("changed", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("tensors", "kept", "rank", "relative error", "energy"):
        table.add_column(title, justify="right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in tensors:
        name = one["name"] if each else _NUMBER.sub("*", one["name"])
        groups.setdefault((name, one["kind"]), []).append(one)
    for (name, kind), group in groups.items():
        ranks = [one["rank"] for one in group if one["rank"]]
        cells = (_span([f"{r}" for r in sorted(ranks)]), *(_between(group, key) for key in ("error", "energy")))
        table.add_row(Text(name), str(len(group)), kind, *cells)
    return table


def _between(group: Sequence[dict[str, Any]], key: str) -> str:
    values = sorted(one[key] for one in group)
    return _span([share(value) if key == "energy" else number(value) for value in values])


def _span(ascending: Sequence[str]) -> str:
    """The first and the last of some numbers."""
    return " to ".join(dict.fromkeys([ascending[0], ascending[-1]])) if ascending else ""
