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
    version = results["machine"].get("mergekit", {}).get("mergekit", "?")
    entries = sum(c["entries"] for c in cells)
    lines = [f"{len(cells)} recipes, {entries:,} entries compared (mergekit {version}, {results['date']})."]
    for arithmetic in dict.fromkeys(cell["arithmetic"] for cell in cells):
        here = [c for c in cells if c["arithmetic"] == arithmetic]
        lines += ["", f"Both computing in {arithmetic}: {_counts(here)}", ""]
        lines += [f"| rule | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
        for rule in rules:
            row = [_cell([c for c in here if c["rule"] == rule and c["family"] == family]) for family in families]
            lines.append(f"| `{rule}` | {' | '.join(row)} |")
        lines += ["", *_remarks(here, rules)]
    refused = [c for c in cells if c["refused"]]
    for reason in dict.fromkeys(c["refused"] for c in refused):
        these = [c for c in refused if c["refused"] == reason]
        which = ", ".join(dict.fromkeys(f"{c['family']} ({c['variant']})" for c in these))
        lines.append(f"- {len(these)} recipes of {which}: {reason.rstrip(':')}")
    return "\n".join(lines)


def _counts(cells: Sequence[Mapping[str, Any]]) -> str:
    apart = sum(1 for c in cells if c["apart"])
    refused = sum(1 for c in cells if c["refused"])
    said = f"in {len(cells) - apart - refused} of {len(cells)} recipes all entries agree to one unit"
    if apart:
        said += f", in {apart} some do not"
    if refused:
        said += f", {refused} stop one of the tools"
    return said + "."


def _remarks(cells: Sequence[Mapping[str, Any]], rules: Sequence[str]) -> list[str]:
    """Which share of the entries of a rule differs by more than a unit, and which ties at a threshold."""
    lines = []
    for rule in rules:
        for dtype in ("float32", "bfloat16"):
            these = [c for c in cells if c["rule"] == rule and c["dtype"] == dtype and not c["refused"]]
            entries = sum(c["entries"] for c in these)
            for key, what in (("apart", "differ by more than a unit"), ("tied", "tie at a threshold")):
                if count := sum(c[key] for c in these):
                    lines.append(f"- `{rule}`, {dtype}: {count:,} of {entries:,} entries {what}")
    return lines


def _cell(cells: Sequence[Mapping[str, Any]]) -> str:
    """The largest difference in float32 and in bfloat16, over the ways of writing parameters."""
    found = []
    for dtype in ("float32", "bfloat16"):
        these = [c for c in cells if c["dtype"] == dtype]
        compared = [c["worst"] for c in these if not c["refused"]]
        found.append(f"{max(compared):.2g}" if compared else "refused" if these else "–")
    return " / ".join(found)
