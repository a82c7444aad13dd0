"""What a merge does to the tokens of its models, counted, with a few examples: for the plan and for regraft.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.checkpoint.mapped_rows import MEAN, ZERO
from regraft.inspect.vocabulary import TokenTable

_EXAMPLES = 5


class Report:
    """Collects one entry per model.

    Args:
        source: the model that was chosen, None for the union.
        giver: the model whose tokenizer is taken, or built on.
        table: the tokens of the output.
        rows: rows of its embedding.
        models: names of the models that give rows.
    """

    def __init__(self, source: str | None, giver: str, table: TokenTable, rows: int, models: Sequence[str]) -> None:
        self._head = {"source": source or "union", "tokenizer_of": giver, "tokens": len(table.ids), "rows": rows}
        self._table, self._names = table, models
        self._models: dict[str, Any] = {}
        self._owned: set[str] = set()

    def add(
        self, model: int, theirs: TokenTable, own: Mapping[str, int], rows: Mapping[str, tuple[int, int]], size: int
    ) -> None:
        """Note a model.

        Args:
            theirs: its tokenizer.
            own: its tokens with the numbers of their rows.
            rows: token of the output -> (origin, row) of what stands for it in this model.
            size: rows of its embedding.
        """
        self._owned |= own.keys()
        ids = self._table.ids
        kept = [t for t in rows if t in own and rows[t] == (model, own[t])]
        filled: dict[int, list[str]] = {}
        for token, (origin, _) in rows.items():
            if token not in own:
                filled.setdefault(origin, []).append(token)
        self._models[self._names[model]] = {
            "tokens": len(theirs.ids),
            "rows": size,
            "same_row": sum(ids[t] == own[t] for t in kept),
            "moved": self._some(t for t in kept if ids[t] != own[t]),
            "replaced": self._some(t for t in rows if t in own and rows[t] != (model, own[t])),
            "filled": {
                "models": {self._names[origin]: self._some(filled[origin]) for origin in sorted(filled) if origin >= 0},
                "mean": self._some(filled.get(MEAN, [])),
                "zeros": self._some(filled.get(ZERO, [])),
            },
            "dropped": self._some((t for t in own if t not in ids), own),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        invented = self._some(t for t in self._table.ids if t not in self._owned)
        return {**self._head, "invented": invented, "models": self._models}

    def _some(self, tokens: Iterable[str], ids: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Their number, and the first of them."""
        found = sorted(tokens, key=(ids or self._table.ids).__getitem__)
        return {"count": len(found), "examples": found[:_EXAMPLES]}


def sentences(report: Mapping[str, Any]) -> list[str]:
    """The report in words: one sentence for the whole, one for each model."""
    whole = f"vocabulary of {report['source']}" if report["source"] != "union" else "union of the vocabularies"
    padding = report["rows"] - report["tokens"]
    lines = [f"{whole}: {report['tokens']:,} tokens" + (f", {padding:,} rows of padding" if padding > 0 else "")]
    if report["invented"]["count"]:
        lines[0] += f"; {_counted(report['invented'])} in no model"
    for name, one in report["models"].items():
        parts = [f"{one['same_row']:,} tokens stay in their rows"]
        parts += [f"{_counted(one[key])} {key}" for key in ("moved", "replaced", "dropped") if one[key]["count"]]
        filled = one["filled"]
        parts += [f"{_counted(some)} filled with rows of {other}" for other, some in filled["models"].items()]
        if filled["mean"]["count"]:
            parts.append(f"{_counted(filled['mean'])} filled with the mean of the models that have them")
        if filled["zeros"]["count"]:
            parts.append(f"{_counted(filled['zeros'])} filled with zeros")
        lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def doubts(report: Mapping[str, Any]) -> list[str]:
    """What of the report may be a mistake."""
    found = []
    if report["invented"]["count"]:
        found.append(
            f"no model has a row for {_counted(report['invented'])} of the tokenizer of {report['tokenizer_of']}"
        )
    for name, one in report["models"].items():
        if one["dropped"]["count"]:
            found.append(f"tokens of {name} that the result does not have: {_counted(one['dropped'])}")
    return found


def _counted(some: Mapping[str, Any]) -> str:
    shown = ", ".join(repr(token) for token in some["examples"])
    return f"{some['count']:,} ({shown}{', ...' if some['count'] > len(some['examples']) else ''})"
