"""What a LoRA adapter keeps of a change, as a table and in a line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.cli.delta_tables import number, share
from regraft.cli.terminal import Terminal
from regraft.cli.words import size_in_words

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def show_changes(terminal: Terminal, tensors: Sequence[Mapping[str, Any]]) -> None:
    """Print a row per group of tensors that differ in the numbers of their names; with --verbose per tensor."""
    from rich.table import Table
    from rich.text import Text

    table = Table("changed", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("tensors", "kept", "rank", "relative error", "energy"):
        table.add_column(title, justify="right")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in tensors:
        name = one["name"] if terminal.verbose else _NUMBER.sub("*", one["name"])
        groups.setdefault((name, one["kind"]), []).append(one)
    for (name, kind), group in groups.items():
        ranks = [str(rank) for rank in sorted(one["rank"] for one in group if one["rank"])]
        errors = [number(error) for error in sorted(one["error"] for one in group)]
        energies = [share(energy) for energy in sorted(one["energy"] for one in group)]
        table.add_row(Text(name), str(len(group)), kind, *map(_span, (ranks, errors, energies)))
    terminal.out.print(table)


def adapter_in_words(out: Path, figures: Mapping[str, Any], output: Mapping[str, Any]) -> str:
    """The line below the table; `output` is that of the lineage."""
    size = f"{output['tensors']} tensors, {size_in_words(output['bytes'])}, {output['dtype']}"
    error = f"relative error {number(figures['relative_error'])}, energy {share(figures['energy'])}"
    return f"{out}: {error}, rank up to {figures['largest_rank']}, {size}"


def _span(ascending: Sequence[str]) -> str:
    """The first and the last of some numbers."""
    return " to ".join(dict.fromkeys([ascending[0], ascending[-1]])) if ascending else ""
