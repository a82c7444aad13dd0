"""The results of `mergekit_parity` as tables: a row for each rule, a column for each family, or for each quantity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Standard errors. Among some thousand comparisons of a distribution with itself, one beyond it is a rare accident.
LIMIT = 5.5
_KINDS = (
    ("apart", "differ by more than a unit"),
    ("tied", "tie at a threshold"),
    ("moved", "follow from the weights that each tool's choice among the tied gives"),
)


def page(results: Path) -> str:
    """The table of a file of results as Markdown; a sentence if there is none."""
    if not results.is_file():
        return "*No results are stored.*"
    return markdown(json.loads(results.read_text(encoding="utf-8")))


def markdown(results: Mapping[str, Any]) -> str:
    cells: Sequence[Mapping[str, Any]] = results["cells"]
    draws = _draws(results.get("random", []))
    if not cells:
        return "\n".join(draws).strip()
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
    return "\n".join([*lines, *draws])


def furthest(row: Mapping[str, Any]) -> float:
    """The largest difference of a row, in standard errors."""
    return max(one["sigmas"] for one in row["found"])


def _draws(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the rules that draw: a quantity in regraft's result / in mergekit's."""
    compared = [row for row in rows if not row["refused"]]
    if not compared:
        return [f"- `{row['rule']}`: mergekit: {row['refused']}" for row in rows]
    quantities = [one["quantity"] for one in compared[0]["found"]]
    head = ["rule", "`rescale`", *quantities, "furthest apart"]
    lines = ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in compared:
        values = [f"{one['ours']:.4g} / {one['theirs']:.4g}" for one in row["found"]]
        cells = [f"`{row['rule']}`", "true" if row["rescale"] else "false", *values, f"{furthest(row):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    unlike = sum(furthest(row) > LIMIT for row in compared)
    told = f"{unlike} of {len(compared)} distributions differ" if unlike else "No distributions differ"
    text = f"{told}: means over {compared[0]['entries']:,} entries, the last column in standard errors (limit {LIMIT})."
    return [*lines, "", text, *(f"- `{row['rule']}`: mergekit: {row['refused']}" for row in rows if row["refused"])]


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
    """Which share of the entries of a rule differs by more than a unit, ties at a threshold, or follows from a tie."""
    lines = []
    for rule in rules:
        for dtype in ("float32", "bfloat16"):
            these = [c for c in cells if c["rule"] == rule and c["dtype"] == dtype and not c["refused"]]
            entries = sum(c["entries"] for c in these)
            for key, what in _KINDS:
                if count := sum(c[key] for c in these):
                    text = f"- `{rule}`, {dtype}: {count:,} of {entries:,} entries {what}"
                    lines.append(text + (_whose(these) if key == "apart" else ""))
    return lines


def _whose(cells: Sequence[Mapping[str, Any]]) -> str:
    """Which of the tools the rounding belongs to: how far each is from mergekit's float64."""
    measured = [c for c in cells if c.get("off") is not None]
    if not measured:
        return ""
    own, peer = (max(c[key] for c in measured) for key in ("off", "peer_off"))
    return f"; regraft is up to {own:.2g} units from mergekit's float64, mergekit's float32 up to {peer:.2g}"


def _cell(cells: Sequence[Mapping[str, Any]]) -> str:
    """The largest difference in float32 and in bfloat16, over the ways of writing parameters."""
    found = []
    for dtype in ("float32", "bfloat16"):
        these = [c for c in cells if c["dtype"] == dtype]
        compared = [c["worst"] for c in these if not c["refused"]]
        found.append(f"{max(compared):.2g}" if compared else "refused" if these else "–")
    return " / ".join(found)
