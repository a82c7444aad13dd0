"""The before/after table of `evaluate: probe`: what each model makes of the same inputs, side by side.

A cell that differs from the first model's has a star, which also survives in a pipe; texts come from models and data,
so whatever could steer a terminal is made visible instead of printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regraft.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from regraft.recipe.run import Evaluation

WIDTH = 40  # characters of an input or of an output
CHANGED = " *"


def show_probes(terminal: Terminal, evaluations: Sequence[Evaluation]) -> None:
    """Print a table for each step whose scores hold answers, and the remarks on them as notes."""
    steps: dict[str, dict[str, Mapping[str, Any]]] = {}
    for one in evaluations:
        if one.score.get("answers"):
            steps.setdefault(one.step, {})[one.model] = one.score
    for step, scores in steps.items():
        starred = f" ({CHANGED.strip()} differs from {next(iter(scores))})" if len(scores) > 1 else ""
        terminal.out.print(f"{step}{starred}", markup=False)
        terminal.out.print(probe_table(scores))
        for model, score in scores.items():
            for remark in score.get("notes", {}).get("remarks", ()):
                terminal.note(f"{step}, {model}: {remark}")


def probe_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """One step's answers: a row per input, a column per model, "output value" in the cells.

    Args:
        scores: model -> its score as plain data, with `answers` to the same inputs in the same order; at least one.
    """
    from rich.table import Table
    from rich.text import Text

    answers = {model: score["answers"] for model, score in scores.items()}
    first = next(iter(answers.values()))
    labelled = any(a["truth"] is not None for a in first)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("input")
    if labelled:
        table.add_column("label")
    for model in answers:
        table.add_column(Text(model))
    for i, asked in enumerate(first):
        cells = [Text(shown(asked["input"]))]
        if labelled:
            cells.append(Text(shown(asked["truth"] or "")))
        for own in answers.values():
            changed = own[i]["output"] != asked["output"]
            cells.append(Text(_cell(own[i]) + CHANGED * changed, style="bold yellow" if changed else ""))
        table.add_row(*cells)
    return table


def shown(text: str) -> str:
    """A text on one line, cut to 40 characters, with line breaks and control characters in escaped form."""
    start = text[: 4 * WIDTH].strip()
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in start)
    return line if len(line) <= WIDTH and len(text.strip()) == len(start) else line[: WIDTH - 1] + "…"


def _cell(answer: Mapping[str, Any]) -> str:
    output = shown(answer["output"]) or "(nothing)"
    return output if answer["value"] is None else f"{output} {answer['value']:.2f}"
