"""What was measured of training and of smaller models as Markdown for the documentation; the standard library alone.

Results are those of `low_rank_latency.py`, of `train_overhead.py` and of `examples/minilm/compress.py`. The load is
what the system said (processes that wanted to run, mean of a minute) before and after; a benchmark's own threads are in
the second number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any


def latency(path: Path) -> str:
    """What the page shows of the latency of low-rank models; a sentence if it has not been measured."""
    if not path.is_file():
        return "No results have been recorded yet; the command below makes them."
    results = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| Model | Batch | Parameters left | Operations left | Original, s | Low-rank, s | Time left | CPU time left |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        shares = [row[name][1] / row[name][0] for name in ("parameters", "flops")]
        before, after = (median(times) for times in row["wall"])
        cells = [
            row["model"],
            str(row["batch"]),
            *map(_percent, shares),
            f"{before:.3g}",
            f"{after:.3g}",
        ]
        lines.append(
            "| " + " | ".join([*cells, f"**{_percent(row['wall_share'])}**", _percent(row["cpu_share"])]) + " |"
        )
    worst, limit = max(row["wall_share"] for row in results["rows"]), results["settings"]["limit"]
    verdict = f"At most {_percent(limit)} is the aim; the largest share here is {_percent(worst)}."
    return "\n".join([*lines, "", f"{verdict} {_how(results)}"])


def overhead(path: Path) -> str:
    """What the page shows of the cost of the training loop."""
    if not path.is_file():
        return "No results have been recorded yet; the command below makes them."
    results = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| Model | Steps | Processor time, regraft / by hand | Time on the clock, regraft / by hand |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        ratios = [_spread(row[name]) for name in ("processor", "clock")]
        lines.append("| " + " | ".join([row["model"], str(row["steps"]), *ratios]) + " |")
    return "\n".join([*lines, "", _how(results)])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _spread(ratios: list[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f}\N{EN DASH}{max(ratios):.3f})"


def _how(results: Mapping[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    threads = settings["threads"]
    return (
        f"{machine['cpu'] or 'A processor that is not told'}, {machine['cores']} cores, {machine['system']}, torch "
        f"{machine['regraft']['torch']}, {threads} thread{'s' if threads > 1 else ''}; {settings['rounds']} rounds of "
        f"both in turns, medians; {_load(results)}."
    )


def _load(results: Mapping[str, Any]) -> str:
    return f"load {results['load'][0]:g} before and {results['load'][1]:g} after, {results['date']}"


def minilm(path: Path) -> str:
    """What the page shows of MiniLM with half of its matrices."""
    if not path.is_file():
        return "No results have been recorded yet; the command makes them."
    results = json.loads(path.read_text(encoding="utf-8"))
    models = results["models"]
    said = {
        "minilm": "MiniLM, the original",
        "factors": "`svd`, not trained",
        "small": "`pela`",
        "original_tuned": "MiniLM, fine-tuned",
        "tuned": "`pela`, fine-tuned",
    }
    lines = [
        "| Model | Similarity | Topics | Parameters | Operations | Time, batch | Time, one text |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, words in said.items():
        facts, empty = models[name], "\N{EN DASH}"
        low, high = facts["interval"]
        score = f"{facts['value']:.3f} ({low:.3f}\N{EN DASH}{high:.3f})"
        scores = [score, empty] if facts["unit"] == "pairs" else [empty, score]
        # A fine-tuned model has the shapes of the one that it was made of, and so its cost.
        cost = models.get("small" if name == "tuned" else name, {}).get("cost")
        cells = [f"{models['small']['cost']['parameters']['before'] / 1e6:.1f} M", *["100 %"] * 3]
        if cost is not None:
            shares = [cost["flops"], *(cost["seconds"][size] for size in (str(cost["batch"]), "1"))]
            cells = [f"{cost['parameters']['after'] / 1e6:.1f} M"]
            cells += [_percent(share["after"] / share["before"]) for share in shares]
        lines.append("| " + " | ".join([words, *scores, *cells]) + " |")
    threads, size = results["threads"], models["small"]["cost"]["batch"]
    how = (
        f"Scores with 95 % intervals; batches of {size}. {results['cpu'] or 'A processor that is not told'}, "
        f"{results['cores']} cores, torch {results['torch']}, {threads} thread{'s' if threads > 1 else ''}; "
        f"{results['seconds']:.0f} s in all, {_load(results)}."
    )
    return "\n".join([*lines, "", how])
