"""Drawings of what fine-tuning changed: angles between task vectors, sign conflicts, sizes by layer.

A run measured these while it merged, and a comparison measures them by itself; both come here as plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.checkpoint.lineage import Lineage
from regraft.report.charts import heat_map, lines
from regraft.report.frame import STYLES
from regraft.report.sections import Cell, Column, Figure, Section, Table

Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Changes:
    """Task vectors of n models.

    Attributes:
        models: their names.
        cosine: (n, n), empty if not measured.
        conflicts: (n, n) shares of entries that moved in both models and in opposite directions; empty if unknown.
        layers: names of the layers, from the input on.
        sizes: per model and layer, ‖change‖ / ‖base‖.
        layer_conflicts: per layer, of the entries that moved in any model, the share that conflicts.
    """

    models: list[str]
    cosine: Sequence[Numbers] = field(default=())
    conflicts: Sequence[Numbers] = field(default=())
    layers: Sequence[str] = ()
    sizes: Sequence[Numbers] = field(default=())
    layer_conflicts: Numbers = ()


def measured_in(lineages: Mapping[str, Lineage]) -> Changes | None:
    """What the merge that measured the most models found; None if none did."""
    measured = [lineage.diagnostics for lineage in lineages.values() if lineage.diagnostics.get("models")]
    if not measured:
        return None
    facts = max(measured, key=lambda d: len(d["models"]))
    layers: Sequence[Mapping[str, Any]] = facts.get("layers") or []
    return Changes(
        models=list(facts["models"]),
        cosine=facts.get("cosine") or [],
        layers=[f"{layer['stack']} {layer['layer']}".strip() for layer in layers],
        sizes=[[_ratio(one["norms"][i], one.get("base_norm")) for one in layers] for i in range(len(facts["models"]))],
        layer_conflicts=[layer.get("sign_conflict") for layer in layers],
    )


def change_figures(changes: Changes) -> list[Section]:
    """The drawings that there are numbers for."""
    names = changes.models
    parts: list[Section] = []
    if len(names) > 1 and changes.cosine:
        title = "Cosines of task vectors"
        drawing = heat_map(names, names, changes.cosine, title="Cosines between task vectors", low=-1.0, high=1.0)
        caption = "Cosine of the angle between task vectors (fine-tune minus base): near 0 they hardly interfere."
        parts.append(Figure(title, drawing, caption, matrix_table(title, "model", names, names, changes.cosine)))
    if len(names) > 1 and changes.conflicts:
        title = "Sign conflicts"
        own = [[None if i == j else v for j, v in enumerate(row)] for i, row in enumerate(changes.conflicts)]
        drawing = heat_map(names, names, own, title=title, percent=True)
        caption = "Of the entries that moved in both models, the percentage that moved in opposite directions."
        table = matrix_table(title, "model", names, names, own, percent=True)
        parts.append(Figure(title, drawing, caption, table))
    if len(changes.layers) > 1:
        parts.append(by_layer(changes))
    if len(names) > 1 and len(changes.layers) > 1 and any(changes.layer_conflicts):
        parts.append(_conflicts_by_layer(changes))
    return parts


def by_layer(changes: Changes) -> Figure:
    """How far each fine-tune moved each layer: lines, or a heat map where there are too few layers or many models."""
    title = "Change by layer"
    caption = "‖change‖ / ‖base‖ of the weights of each layer, for each fine-tune."
    places = [f"layer {n}" for n in changes.layers]
    table = matrix_table(title, "model", changes.models, places, changes.sizes, digits=4)
    if len(changes.layers) < 4 or len(changes.models) > STYLES:
        top = max((v for row in changes.sizes for v in row if v is not None), default=1.0) or 1.0
        columns = places if len(changes.layers) < 4 else list(changes.layers)
        drawing = heat_map(changes.models, columns, changes.sizes, title=title, high=top, form=".2g")
    else:
        series = dict(zip(changes.models, changes.sizes, strict=True))
        drawing = lines(series, changes.layers, title=title, y_title="‖change‖ / ‖base‖", x_title="layer")
    return Figure(title, drawing, caption, table)


def matrix_table(
    title: str,
    first: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Numbers],
    *,
    digits: int = 3,
    percent: bool = False,
) -> Table:
    """A matrix in words, for those who do not see its drawing."""
    style: dict[str, Any] = {"digits": 1, "percent": True} if percent else {"digits": digits, "significant": True}
    head = [Column(first), *(Column(name, **style) for name in columns)]
    body: list[list[Cell | float | str | None]] = [[name, *own] for name, own in zip(rows, values, strict=True)]
    return Table(title, head, body)


def _conflicts_by_layer(changes: Changes) -> Figure:
    title = "Sign conflicts by layer"
    caption = "Of the entries that moved in any model, the percentage that moved up in one and down in another."
    shares = [None if v is None else 100 * v for v in changes.layer_conflicts]
    table = matrix_table(title, "", ["conflict, %"], [f"layer {n}" for n in changes.layers], [shares], digits=1)
    y_title = "entries in conflict, %"
    drawing = lines({"all models": shares}, changes.layers, title=title, y_title=y_title, x_title="layer")
    return Figure(title, drawing, caption, table)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
