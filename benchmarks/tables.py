"""Results as tables: for the terminal while a benchmark runs, and as Markdown for the documentation.

A table is a list of (heading, function of a row); both forms are made from it. Imports nothing but the standard
library, so that the documentation can be built from results alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]


def seconds(values: Sequence[float]) -> str:
    """`1.93 (1.90-2.01)`: the median, and the extremes if there are several."""
    return _spread(values, lambda v: f"{v:.2f}" if v < 100 else f"{v:.0f}")


def megabytes(values: Sequence[float]) -> str:
    return f"{max(values) / 1e6:.0f}" if max(values) else "not told"


def _spread(values: Sequence[float], write: Callable[[float], str]) -> str:
    if not values:
        return "–"
    middle = write(median(values))
    return middle if len(values) == 1 else f"{middle} ({write(min(values))}–{write(max(values))})"


def _tool(row: Row, tool: str, key: str, write: Callable[[Sequence[float]], str]) -> str:
    runs = row.get(tool) or []
    failed = [run["status"] for run in runs if run["status"]]
    if failed:
        return f"failed ({failed[0]})"
    return write([run[key] for run in runs]) if runs else "–"


def _ratio(row: Row) -> str:
    """How many times longer the peer takes; the median over pairs."""
    ours, peers = row.get("regraft") or [], row.get("peer") or []
    if not ours or not peers or any(run["status"] for run in [*ours, *peers]):
        return "–"
    pairs = [peer["wall"] / own["wall"] for own, peer in zip(ours, peers, strict=False)]
    return _spread(pairs, lambda v: f"{v:.1f}")


def _rule(row: Row) -> str:
    if row.get("skipped"):
        return f"{row['rule']}: skipped"
    return f"{row['rule']} / {row['against']}" if row.get("against", "mergekit") != "mergekit" else str(row["rule"])


COMPARISON: Columns = (
    ("rule", _rule),
    ("regraft, s", lambda r: _tool(r, "regraft", "wall", seconds)),
    ("mergekit, s", lambda r: _tool(r, "peer", "wall", seconds)),
    ("times faster", _ratio),
    ("CPU regraft, s", lambda r: _tool(r, "regraft", "cpu", seconds)),
    ("CPU mergekit, s", lambda r: _tool(r, "peer", "cpu", seconds)),
    ("memory regraft, MB", lambda r: _tool(r, "regraft", "private", megabytes)),
    ("memory mergekit, MB", lambda r: _tool(r, "peer", "private", megabytes)),
    ("read, GB", lambda r: f"{r['bytes_read'] / 1e9:.2f}" if "bytes_read" in r else "–"),
    ("written, GB", lambda r: f"{r['bytes_written'] / 1e9:.2f}" if "bytes_written" in r else "–"),
)
SCALING: Columns = (
    ("rule", _rule),
    ("parameters", lambda r: f"{r['parameters'] / 1e9:.3g} B"),
    ("regraft, s", lambda r: _tool(r, "regraft", "wall", seconds)),
    ("ns per parameter", lambda r: _tool(r, "regraft", "wall", lambda w: f"{median(w) / r['parameters'] * 1e9:.2f}")),
    ("reading the inputs, s", lambda r: seconds([r["read_seconds"]]) if "read_seconds" in r else "–"),
    ("memory, MB", lambda r: _tool(r, "regraft", "private", megabytes)),
    ("files in memory", lambda r: {True: "yes", False: "no"}.get(r.get("cached"), "–")),  # type: ignore[arg-type]
)
LIMIT: Columns = (
    ("rule", _rule),
    ("parameters", lambda r: f"{r['parameters'] / 1e9:.3g} B"),
    ("models", lambda r: str(r["checkpoints"])),
    ("GB per model", lambda r: f"{r['bytes_each'] / 1e9:.2f}"),
    ("limit, MB", lambda r: f"{r['limit_bytes'] / 1e6:.0f}"),
    ("result", lambda r: _tool(r, "regraft", "status", lambda _: "passed")),
    ("regraft, s", lambda r: _tool(r, "regraft", "wall", seconds)),
    ("memory, MB", lambda r: _tool(r, "regraft", "private", megabytes)),
    ("address space, MB", lambda r: _tool(r, "regraft", "data", megabytes)),
)
PREDICTION: Columns = (
    ("rule", _rule),
    ("parameters", lambda r: f"{r['parameters'] / 1e9:.3g} B"),
    ("predicted, MB", lambda r: f"{r['predicted']['memory_bytes'] / 1e6:.0f}"),
    ("private / resident, MB", lambda r: f"{_most(r, 'private') / 1e6:.0f} / {_most(r, 'resident') / 1e6:.0f}"),
    ("predicted / private", lambda r: _share(r["predicted"]["memory_bytes"], _most(r, "private"))),
    ("predicted / resident", lambda r: _share(r["predicted"]["memory_bytes"], _most(r, "resident"))),
    ("predicted, s", lambda r: f"{r['predicted']['seconds_estimated']:.1f}"),
    ("measured, s", lambda r: _tool(r, "regraft", "wall", seconds)),
    (
        "predicted / measured",
        lambda r: _share(r["predicted"]["seconds_estimated"], median(run["wall"] for run in r["regraft"])),
    ),
)
FEW = 3  # rules that a title names
MODES = {"compare": COMPARISON, "scaling": SCALING, "limit": LIMIT}


def _most(row: Row, key: str) -> float:
    return float(max(run[key] for run in row["regraft"]))


def _share(predicted: float, measured: float) -> str:
    return f"{predicted / measured:.2f}" if measured else "–"


def cells(columns: Columns, row: Row) -> list[str]:
    """The texts of one row; a rule that was skipped has nothing but its name and the reason."""
    if row.get("skipped"):
        return [columns[0][1](row), *("" for _ in columns[1:])]
    return [write(row) for _, write in columns]


def markdown(results: Mapping[str, Any]) -> str:
    """What the documentation shows of one file of results: how it was made, and its tables."""
    parts = [f"### {title(results)}", _machine(results["machine"]), _settings(results)]
    parts.append(_table(MODES[results["mode"]], results["rows"]))
    for row in results["rows"]:
        if row.get("skipped"):
            parts.append(f"`{row['rule']}` was skipped: {row['skipped']}.")
        elif row.get("peer") and row["against"] != "mergekit":
            rule, peer = row["rule"], row["against"]
            parts.append(f"mergekit does not have `{rule}`: in its row stands regraft's `{peer}` in mergekit's place.")
    predicted = [row for row in results["rows"] if row.get("predicted") and _succeeded(row)]
    if predicted:
        parts += ["What `regraft plan` had predicted:", _table(PREDICTION, predicted)]
    if results.get("references"):
        rows = [f"| {r['what']} | {seconds(r['wall'])} | {r['bytes'] / 1e9:.2f} |" for r in results["references"]]
        parts += ["For comparison:", "\n".join(["| | s | GB |", "|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def title(results: Mapping[str, Any]) -> str:
    """What one file of results is about, in a line."""
    settings = results["settings"]
    if results["mode"] == "scaling":
        return f"Size: {settings['checkpoints']} checkpoints, {settings['dtype']}"
    size = (
        f"{settings['parameters'] / 1e9:.3g} B parameters, {settings['checkpoints']} checkpoints, {settings['dtype']}"
    )
    if results["mode"] == "limit":
        return f"Limited memory: {size}"
    if given := re.search(r"--regraft-args=(\S+)", settings.get("command", "")):
        size += f", `{given[1]}`"
    rules = [row["rule"] for row in results["rows"] if not row.get("skipped")]
    return f"Speed of {', '.join(rules)}: {size}" if 0 < len(rules) <= FEW else f"Speed: {size}"


def pages(folder: Path) -> str:
    """The Markdown of all results in a folder, comparisons first; a sentence if there are none."""
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [results for results in stored if "mode" in results]  # the others are of other benchmarks
    if not found:
        return "No results have been recorded yet; the commands below make them."
    return "\n".join(markdown(results) for results in sorted(found, key=lambda r: list(MODES).index(r["mode"])))


def _succeeded(row: Row) -> bool:
    return bool(row.get("regraft")) and not any(run["status"] for run in row["regraft"])


def _table(columns: Columns, rows: Sequence[Row]) -> str:
    lines = [[name for name, _ in columns], ["---"] * len(columns), *(cells(columns, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _machine(machine: Mapping[str, Any]) -> str:
    sizes = f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB of memory"
    text = f"{machine['cpu'] or 'A processor that is not told'}, {sizes}, {machine['disk']}, {machine['system']}."
    for tool in ("regraft", "mergekit"):
        if tool in machine:
            versions = ", ".join(f"{name} {version}" for name, version in machine[tool].items() if name != tool)
            text += f" {tool} {machine[tool][tool]} with {versions}."
    return text


def _settings(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    text = f"{settings['pairs']} run{'s' if settings['pairs'] > 1 else ''} of each"
    if "mergekit" in results["machine"]:
        text += " tool, alternating"
    text += f"; times are the median (smallest–largest), memory is the largest. Made on {results['date']} by"
    return f"{text}\n\n```sh\n{settings['command']}\n```"
