"""A stored delta as a table: its base, its size and errors, and the tensors that come back least well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.cli.facts_table import listed
from regraft.cli.terminal import Terminal
from regraft.cli.words import size_in_words

if TYPE_CHECKING:
    from regraft.checkpoint.delta_record import Delta

_WORST = 5


def show_delta(terminal: Terminal, name: str, delta: Delta, size: int) -> None:
    """Print what a delta holds."""
    from rich.table import Table
    from rich.text import Text

    counts = delta.summary()["encodings"]
    density = f", density {delta.density:g}" if delta.density is not None else ""
    rows = {
        "kind": delta.kind + density,
        "base": f"{delta.base.name}, digest {delta.base.digest[:16]}",
        "fine-tune": f"{delta.model.name}, digest {delta.model.digest[:16]}",
        "size": size_in_words(size),
        "tensors": ", ".join(f"{count} {encoding}" for encoding, count in counts.items()),
        "only in the base": listed(delta.removed),
        "exact entries": f"{delta.exact:.4%}",
        "relative error": f"{delta.relative_error:.4g}",
        "licence": delta.licence,
    }
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for title, value in rows.items():
        if value:
            table.add_row(Text(title, style="bold"), Text(value))
    worst = sorted(delta.tensors.items(), key=lambda pair: -pair[1].relative_error)[:_WORST]
    for i, (tensor, record) in enumerate(worst):
        if record.relative_error:
            title = "largest errors" if i == 0 else ""
            table.add_row(Text(title, style="bold"), Text(f"{record.relative_error:.4g}  {tensor}"))
    terminal.out.print(name, markup=False, style="bold")
    terminal.out.print(table)
