"""What fine-tuning changed, as tables: per model, per pair of models, per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regraft.cli.terminal import Terminal
from regraft.inspect.words import number as number
from regraft.inspect.words import share as share
from regraft.inspect.words import short_names as short_names

if TYPE_CHECKING:
    from rich.table import Table


def show_deltas(terminal: Terminal, found: Mapping[str, Any]) -> None:
    """Print what `Deltas.to_dict` gives; remarks go to stderr as notes."""
    names = short_names(found["models"])
    console = terminal.out
    console.print(f"\nChanges to {found['base']}", markup=False, style="bold")
    console.print(_per_model(names, found["total"]))
    for i, name in enumerate(names):
        console.print(f"  {name}: {found['base_check'][i]['sentence']}", markup=False)
        console.print(f"  {name}: {found['sparsification'][i]}", markup=False)
    if len(names) > 1:
        console.print("\nTask vectors against each other", style="bold")
        console.print(_per_pair(names, found["total"]))
    for stack, layers in found["layers"].items():
        if layers:
            title = f"\nPer layer{f' of the {stack}' if stack else ''}: relative size of the changes"
            console.print(title, markup=False, style="bold")
            console.print(_per_layer(names, layers))
    for remark in found["remarks"]:
        terminal.note(remark)


def _per_model(names: Sequence[str], total: Mapping[str, Any]) -> Table:
    table = _table("model", "relative size", "mean |change|", "90 % within", "unchanged", "cosine to base")
    for i, name in enumerate(names):
        cells = (total["relative"][i], total["mean_abs"][i], total["quantiles"][i]["0.9"])
        table.add_row(name, *map(number, cells), share(total["unchanged"][i]), number(total["base_cosine"][i]))
    return table


def _per_pair(names: Sequence[str], total: Mapping[str, Any]) -> Table:
    table = _table("models", "cosine", "sign conflicts")
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            cells = number(total["cosine"][i][j]), share(total["pair_conflict"][i][j])
            table.add_row(f"{one}, {names[j]}", *cells)
    if len(names) > 2:
        table.add_row("all", "", share(total["sign_conflict"]))
    return table


def _per_layer(names: Sequence[str], layers: Sequence[Mapping[str, Any]]) -> Table:
    conflicts = ["sign conflicts"] if len(names) > 1 else []
    table = _table("layer", *names, *conflicts)
    for index, layer in enumerate(layers):
        cells = [number(value) for value in layer["relative"]]
        table.add_row(str(index), *cells, *([share(layer["sign_conflict"])] if conflicts else []))
    return table


def _table(first: str, *others: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(escape(first), box=None, padding=(0, 2), pad_edge=True)
    for title in others:
        table.add_column(escape(title), justify="right")
    return table
