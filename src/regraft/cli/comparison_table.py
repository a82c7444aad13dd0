"""How models relate, and which operations can combine them, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regraft.cli.delta_tables import short_names
from regraft.cli.facts_table import listed
from regraft.cli.terminal import Terminal

if TYPE_CHECKING:
    from regraft.inspect.compare import Comparison, Pair


def show_comparison(terminal: Terminal, found: Comparison) -> None:
    """Print what each two of the models have in common, then the verdicts."""
    from rich.table import Table
    from rich.text import Text

    console = terminal.out
    names = short_names(found.models)
    console.print("\nHow they relate", style="bold")
    for pair in found.pairs:
        console.print(f"  {names[pair.a]} and {names[pair.b]}: {_relation(pair)}", markup=False)
        for line in _differences(pair, names[pair.a], names[pair.b]):
            console.print(f"    {line}", markup=False)
    beside = f", on the base {found.base}" if found.base else ""
    console.print(f"\nWhat can combine them{beside}", markup=False, style="bold")
    table = Table(box=None, padding=(0, 2), pad_edge=True, show_header=False)
    for one in found.operations:
        verdict = Text("yes", style="green") if one.possible else Text("no", style="red")
        reason = one.reason if one.possible else f"{one.reason} ({one.code}): {one.fix}"
        table.add_row(Text(one.name), verdict, Text(reason))
    console.print(table)


def _relation(pair: Pair) -> str:
    weights = "identical weights" if pair.identical else f"weights {pair.distance.sentence()}"
    tokens = {"same": "same tokenizer", "none": "no tokenizers", "unknown": "tokenizers unknown"}
    return f"{weights}; {tokens.get(pair.tokenizers, f'tokenizers: {pair.tokenizers}')}"


def _differences(pair: Pair, a: str, b: str) -> list[str]:
    lines = [f"{d.key}: {_short(d.a)} and {_short(d.b)}" for d in pair.config if d.matters]
    shapes = (f"{name} {list(one)} and {list(other)}" for name, (one, other) in pair.shapes.items())
    for title, names in ((f"only in {a}", pair.only_a), (f"only in {b}", pair.only_b), ("other shapes", shapes)):
        if text := listed(names):
            lines.append(f"{title}: {text}")
    return lines


def _short(value: Any, most: int = 60) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= most else text[: most - 3] + "..."
