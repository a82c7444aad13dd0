"""The page of a comparison: several checkpoints without a run, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.inspect.compare import Comparison, Pair
from regraft.inspect.deltas import Deltas
from regraft.inspect.facts import Facts
from regraft.inspect.words import FACTS, short_names, size_in_words
from regraft.report.changes import Changes, change_figures, matrix_table
from regraft.report.charts import heat_map
from regraft.report.graph import Edge, Node
from regraft.report.page import write_page
from regraft.report.sections import Cell, Column, Entries, Entry, Figure, Graph, Section, Table, Text

_LONGEST = 60  # characters of a value in the table of differences
# Verdicts of `Distance` as said of two models of which none need be the base of the other.
_NEAR = {
    "identical": "identical as far as sampled",
    "fine-tune": "as near as a fine-tune",
    "far": "related, but far for a fine-tune",
    "unrelated": "as far as strangers",
    "unknown": "nothing in common to measure",
}
_MOST = 200  # rows of the table of differences; config files of one family differ in far fewer


def write_comparison(
    path: Path, models: Sequence[Facts], comparison: Comparison | None = None, changes: Deltas | None = None
) -> Path:
    """Write the page.

    Args:
        path: the file.
        models: the facts of all, the base first where there is one.
        comparison, changes: from `compare` and `deltas`, of the models without the base.

    Raises:
        UserError: RG405 if the page cannot be written.
    """
    names = short_names([facts.ref for facts in models])
    stored = [facts.size.bytes for facts in models if facts.size.bytes is not None]
    facts = {"models": str(len(models)), "weights": size_in_words(sum(stored))} if stored else {}
    if changes is not None:
        facts["base"] = names[0]
    return write_page(
        path,
        title=" and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}",
        sections=comparison_sections(models, comparison, changes),
        summary=_summary(names[len(names) - len(comparison.models) :], comparison) if comparison is not None else [],
        facts=facts,
    )


def comparison_sections(
    models: Sequence[Facts], comparison: Comparison | None = None, changes: Deltas | None = None
) -> list[Section]:
    """All that was found, as sections; arguments as in `write_comparison`."""
    every = short_names([facts.ref for facts in models])
    parts: list[Section] = []
    if comparison is not None:
        names = every[len(every) - len(comparison.models) :]
        parts.append(_operations(comparison))
        if (graph := _families(every, names, comparison)) is not None:
            parts.append(graph)
        parts += _distances(names, comparison)
        parts.append(_pairs(names, comparison))
        parts += _differences(names, comparison)
    if changes is not None:
        parts += _changes(every[1:], changes)
    parts += [_facts(every, models), _entries(every, models, changes is not None)]
    if remarks := _remarks(every, models, changes):
        parts.append(Text("Remarks", remarks))
    return parts


def _summary(names: Sequence[str], found: Comparison) -> list[str]:
    possible = [one.name for one in found.operations if one.possible]
    beside = f" with {short_names([found.base])[0]} as their base" if found.base else ""
    if possible:
        return [f"These operations can combine them{beside}: {', '.join(possible)}."]
    first = found.operations[0]
    return [f"No operation that is judged here can combine them{beside}: {first.reason}."]


def _operations(found: Comparison) -> Table:
    rows: list[list[Cell | float | str | None]] = [
        [
            one.name,
            "yes" if one.possible else "no",
            one.reason if one.possible else f"{one.reason} ({one.code})",
            one.fix or None,
        ]
        for one in found.operations
    ]
    columns = [Column("operation"), Column("possible"), Column("why"), Column("what would help")]
    caption = "Possible means that the result would make sense, not only that shapes agree."
    return Table("What can combine them", columns, rows, caption)


def _families(every: Sequence[str], names: Sequence[str], found: Comparison) -> Graph | None:
    """The base and the models that come from it; None without a base."""
    if found.base is None:
        return None
    nodes = [Node(every[0], every[0], found.facts[0].architecture.model_type or "", "base", "model:0")]
    edges = []
    for i, (name, facts) in enumerate(zip(names, found.facts, strict=True), 1):
        detail = " · ".join(filter(None, [facts.architecture.model_type, ", ".join(facts.card.licences)]))
        nodes.append(Node(name, name, detail, "model", f"model:{i}"))
        edges.append(Edge(every[0], name))
    caption = "The base as it was named; how near each model is to it was measured, see below."
    return Graph("Lineage", nodes, edges, caption, [("base", "base"), ("model", "compared")])


def _distances(names: Sequence[str], found: Comparison) -> list[Section]:
    """Cosines between the weights of models, where they could be measured."""
    n = len(names)
    cosine: list[list[float | None]] = [[1.0 if i == j else None for j in range(n)] for i in range(n)]
    for pair in found.pairs:
        cosine[pair.a][pair.b] = cosine[pair.b][pair.a] = pair.distance.cosine
    if not any(pair.distance.cosine is not None for pair in found.pairs):
        return []
    title = "How near their weights are"
    drawing = heat_map(names, names, cosine, title=title, low=-1.0, high=1.0, form=".3f")
    caption = (
        "Cosine between weight matrices inside the layers, the median, on a sample of each: 1 is the same direction, "
    )
    caption += "fine-tunes of one base are near 1, models without a common start near 0."
    return [Figure(title, drawing, caption, matrix_table(title, "model", names, names, cosine, digits=4))]


def _pairs(names: Sequence[str], found: Comparison) -> Table:
    columns = [Column("models"), Column("weights"), Column("cosine", digits=4), Column("relative distance", digits=4)]
    columns += [Column("tokenizers"), Column("config keys that differ"), Column("tensors that differ")]
    rows: list[list[Cell | float | str | None]] = []
    for pair in found.pairs:
        weights = "identical to the bit" if pair.identical else _NEAR[pair.distance.verdict]
        keys = [d.key for d in pair.config if d.matters]
        shapes = len(pair.only_a) + len(pair.only_b) + len(pair.shapes)
        rows.append(
            [
                f"{names[pair.a]}, {names[pair.b]}",
                weights,
                pair.distance.cosine,
                pair.distance.relative,
                pair.tokenizers,
                Cell(len(keys), note=", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")),
                Cell(shapes, note=_tensors(pair)),
            ]
        )
    caption = "Keys count if they change what weights compute, tensors if a model lacks them or has another shape."
    return Table("Pair by pair", columns, rows, caption)


def _tensors(pair: Pair) -> str:
    lists = [*pair.shapes, *pair.only_a, *pair.only_b]
    return ", ".join(lists[:2]) + (", …" if len(lists) > 2 else "")


def _differences(names: Sequence[str], found: Comparison) -> list[Section]:
    """Keys of the configurations in which any two models differ."""
    values: dict[str, dict[int, Any]] = {}
    matters: dict[str, bool] = {}
    for pair in found.pairs:
        for one in pair.config:
            values.setdefault(one.key, {}).update({pair.a: one.a, pair.b: one.b})
            matters[one.key] = matters.get(one.key, False) or one.matters
    if not values:
        return []
    rows: list[list[Cell | float | str | None]] = []
    for key in sorted(values, key=lambda k: not matters[k])[:_MOST]:
        told = [_short(values[key][i]) if i in values[key] else "as the others" for i in range(len(names))]
        rows.append([key, "yes" if matters[key] else "no", *told])
    columns = [Column("key"), Column("changes results"), *(Column(name) for name in names)]
    caption = f"{len(values) - _MOST} more keys are left out." if len(values) > _MOST else ""
    return [Table("Differences of config.json", columns, rows, caption)]


def _changes(names: Sequence[str], found: Deltas) -> list[Section]:
    """What each model changed in the base, and how these changes go together."""
    total = found.total
    columns = [Column("model"), Column("‖change‖ / ‖base‖", digits=3, significant=True)]
    columns.append(Column("mean |change|", digits=3, significant=True))
    columns += [Column("unchanged %", percent=True), Column("cosine to base", digits=4), Column("what this means")]
    rows: list[list[Cell | float | str | None]] = []
    for i, (name, advice) in enumerate(zip(names, found.sparsification(), strict=True)):
        rows.append(
            [
                name,
                total.relative[i],
                total.mean_abs[i],
                total.unchanged[i],
                total.base_cosine[i],
                Cell(found.base_check[i].sentence(), note=advice),
            ]
        )
    own = [one for stack in found.layers.values() for one in stack]
    stacks = [f"{stack} {i}".strip() for stack, layers in found.layers.items() for i in range(len(layers))]
    pictures = change_figures(
        Changes(
            models=list(names),
            cosine=total.cosine,
            conflicts=total.pair_conflict,
            layers=stacks,
            sizes=[[one.relative[i] for one in own] for i in range(len(names))],
            layer_conflicts=[one.sign_conflict for one in own],
        )
    )
    parts: list[Section] = [Table("What changed in the base", columns, rows), *pictures]
    return [*parts, *_parts(names, found)]


def _parts(names: Sequence[str], found: Deltas) -> list[Section]:
    """Where in the layers each model changed: one drawing per model and stack, for a few models."""
    drawings: list[Section] = []
    for stack, layers in found.parts.items():
        kinds = list(dict.fromkeys(part for layer in layers for part in layer))
        for i, name in enumerate(names[:4]):
            values = [[layer[part][i] if part in layer else None for layer in layers] for part in kinds]
            top = max((v for row in values for v in row if v is not None), default=0.0)
            if len(layers) < 2 or not top:
                continue
            title = f"Mean |change| by part: {name}{f', {stack}' if stack else ''}"
            places = [str(layer) for layer in range(len(layers))]
            rows = [part or "other" for part in kinds]
            drawing = heat_map(rows, places, values, title=title, high=top, form=".1e")
            table = matrix_table(title, "part", rows, [f"layer {p}" for p in places], values, digits=6)
            drawings.append(Figure(title, drawing, "Over the layers from the input on.", table))
    return drawings


def _facts(names: Sequence[str], models: Sequence[Facts]) -> Table:
    rows: list[list[Cell | float | str | None]] = []
    for title, read in FACTS.items():
        cells = [read(facts) for facts in models]
        if any(cell is not None for cell in cells):
            note = "differs" if len(set(cells)) > 1 else ""
            rows.append([Cell(title, note=note), *cells])
    return Table("Facts", [Column("fact"), *(Column(name) for name in names)], rows, "Read from the files, not run.")


def _entries(names: Sequence[str], models: Sequence[Facts], with_base: bool) -> Entries:
    entries = []
    for i, (name, facts) in enumerate(zip(names, models, strict=True)):
        found: Mapping[str, str] = {
            "reference": facts.ref,
            "revision": facts.revision or "",
            **{title: text for title, read in FACTS.items() if (text := read(facts))},
        }
        told = {key: value for key, value in found.items() if value}
        entries.append(Entry(name, f"model:{i}", told, facts.ref, "base" if with_base and i == 0 else "model"))
    return Entries("Every model", entries)


def _remarks(names: Sequence[str], models: Sequence[Facts], changes: Deltas | None) -> list[str]:
    found = []
    for name, facts in zip(names, models, strict=True):
        found += [f"{name}: contradiction in {c.subject}: {c.card}; {c.found}" for c in facts.contradictions]
        found += [f"{name}: {remark}" for remark in facts.remarks]
    return found + (changes.remarks if changes is not None else [])


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
