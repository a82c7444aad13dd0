"""The results of `mergekit_parity` as a table: a row for each rule, a column for each family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def page(results: Path) -> str:
    """The table of a file of results as Markdown; a sentence if there is none."""
    if not results.is_file():
        return "*No results are stored.*"
    return markdown(json.loads(results.read_text(encoding="utf-8")))


def markdown(results: Mapping[str, Any]) -> str:
    cells: Sequence[Mapping[str, Any]] = results["cells"]
    families = list(dict.fromkeys(cell["family"] for cell in cells))
    rules = list(dict.fromkeys(cell["rule"] for cell in cells))
    lines = [f"| rule | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
    for rule in rules:
        row = [_cell([c for c in cells if c["rule"] == rule and c["family"] == family]) for family in families]
        lines.append(f"| `{rule}` | {' | '.join(row)} |")
    apart = [c for c in cells if c["apart"]]
    refused = [c for c in cells if c["refused"]]
    entries = sum(c["entries"] for c in cells)
    version = results["machine"].get("mergekit", {}).get("mergekit", "?")
    same = len(cells) - len(apart) - len(refused)
    counts = f"{same} give the same model up to rounding, in {len(apart)} some entries differ by more"
    if refused:
        counts += f", {len(refused)} stop one of the tools"
    lines += ["", f"{len(cells)} recipes, {entries:,} entries: {counts} (mergekit {version}, {results['date']}).", ""]
    for rule in rules:
        for dtype in ("float32", "bfloat16"):
            these = [c for c in apart if c["rule"] == rule and c["dtype"] == dtype]
            if these:
                share = sum(c["apart"] for c in these) / sum(c["entries"] for c in these)
                lines.append(f"- `{rule}`, {dtype}: {share:.1g} of the entries, in {len(these)} recipes")
    for reason in dict.fromkeys(c["refused"] for c in refused):
        these = [c for c in refused if c["refused"] == reason]
        which = ", ".join(dict.fromkeys(f"{c['family']} ({c['variant']})" for c in these))
        lines.append(f"- {len(these)} recipes of {which}: {reason.rstrip(':')}")
    return "\n".join(lines)


def _cell(cells: Sequence[Mapping[str, Any]]) -> str:
    """The largest difference in float32 and in bfloat16, over the ways of writing parameters."""
    found = []
    for dtype in ("float32", "bfloat16"):
        these = [c for c in cells if c["dtype"] == dtype]
        compared = [c["worst"] for c in these if not c["refused"]]
        found.append(f"{max(compared):.2g}" if compared else "refused" if these else "–")
    return " / ".join(found)
