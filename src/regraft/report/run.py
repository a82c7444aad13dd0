"""The page of a run, from what the run left behind: scores, and the lineage file of every model that it made.

Nothing is computed here that is not in those files, so a page can be written again at any time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from regraft.checkpoint.lineage import Lineage
from regraft.inspect.metric import Answer, Score
from regraft.merge.rule import field_names
from regraft.methods import method
from regraft.report.charts import Bar, bars, heat_map, lines
from regraft.report.graph import Edge, Node
from regraft.report.sections import Cell, Column, Figure, Graph, Section, Table, Text

KINDS = (("base", "base"), ("model", "fine-tuned"), ("merge", "merged"))


class Scored(Protocol):
    """One evaluation of a run: which metric of which model, by which step, and the score as plain data."""

    @property
    def step(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def score(self) -> Mapping[str, Any]: ...


def read_lineages(artefacts: Mapping[str, Path], show: Collection[str] | None = None) -> dict[str, Lineage]:
    """The lineage of each model of a run by step name; only of those in `show`, and of what they were made from."""
    found = {name: Lineage.read(folder) for name, folder in artefacts.items()}
    if show is None:
        return found
    wanted, waiting = set(), [name for name in show if name in found]
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += [record.name for record in found[name].inputs if record.name in found]
    return {name: lineage for name, lineage in found.items() if name in wanted}


def run_sections(
    evaluations: Iterable[Scored], artefacts: Mapping[str, Path], *, show: Collection[str] | None = None
) -> list[Section]:
    """All that can be said of a run.

    Args:
        evaluations: of the run, in order; a table and drawings are made for each step.
        artefacts: step name -> folder of the model it made.
        show: names of the models to show, for example the best of each sweep; all if None.

    Raises:
        UserError: RG105 if a lineage file cannot be read.
    """
    lineages = read_lineages(artefacts, show)
    kinds = _kinds(lineages)
    sections: list[Section] = []
    steps: dict[str, list[Scored]] = {}
    for one in evaluations:
        if show is None or one.model in show:
            steps.setdefault(one.step, []).append(one)
    for step, scored in steps.items():
        sections += score_sections(f"{step}: {scored[0].metric}" if len(steps) > 1 else "Scores", scored, kinds)
    if lineages:
        sections += [lineage_graph(lineages), *delta_figures(lineages), lineage_table(lineages)]
        recipes = dict.fromkeys(lineage.recipe for lineage in lineages.values() if lineage.recipe)
        sections += [Text("Recipe", code=text, folded=True) for text in recipes]
    return sections


def score_sections(title: str, evaluations: Sequence[Scored], kinds: Mapping[str, str]) -> list[Section]:
    """One step's scores: a table with the best marked, bars with intervals, and a heat map over groups."""
    scores = {e.model: Score.model_validate(e.score) for e in evaluations}
    first = next(iter(scores.values()))
    groups = list(dict.fromkeys(g for score in scores.values() for g in score.per_group))
    share = all(0 <= s.value <= 1 for s in scores.values()) and evaluations[0].metric == "accuracy"
    # Without labels the value of a probe says how sure a model is, not how good.
    judged = not first.answers or any(answer.truth is not None for answer in first.answers)
    better = ("high" if first.higher_is_better else "low") if judged else None
    style: dict[str, Any] = {"better": better, "percent": share, "digits": 1 if share else 3}
    columns = [Column("model"), Column(f"{evaluations[0].metric}{' %' * share}", **style)]
    columns += [Column(g, **style, shade=first.higher_is_better) for g in groups]
    order = [name for kind, _ in KINDS for name in scores if kinds.get(name, "model") == kind]
    rows = []
    for name in order:
        own = scores[name]
        rows.append(
            [
                name,
                Cell(own.value, own.interval),
                *(own.per_group[g].value if g in own.per_group else None for g in groups),
            ]
        )
    caption = f"{first.n:,} {first.unit} per model. Small print: 95 % interval, taking rows as independent. "
    caption += "The best of each column is bold." if judged else "The value says how sure a model is, not how good."
    table = Table(title, columns, rows, caption, [kinds.get(name, "model") for name in order])
    if first.answers:
        return [table, _answers(f"{title}: answers", {name: scores[name].answers for name in order})]
    if not share:
        return [table]
    chart = bars([Bar(n, scores[n].value, scores[n].interval, kinds.get(n, "model")) for n in order])
    parts: list[Section] = [table, Figure(f"{title}: overall", chart, "Share of right answers with its 95 % interval.")]
    bases = [name for name in order if kinds.get(name) == "base"]
    if len(bases) == 1 and len(order) > 1 and groups:
        parts.append(_against_base(f"{title}: gain over {bases[0]}", bases[0], scores, order, groups))
    return parts


def _answers(title: str, answers: Mapping[str, Sequence[Answer]]) -> Table:
    """What each model makes of each input."""
    first = next(iter(answers.values()))
    rows = [[asked.input, *(_said(own[i]) for own in answers.values())] for i, asked in enumerate(first)]
    return Table(title, [Column("input"), *(Column(name) for name in answers)], rows, "Behind each answer: its value.")


def _said(answer: Answer) -> str:
    return answer.output if answer.value is None else f"{answer.output} ({answer.value:.2f})"


def _against_base(
    title: str, base: str, scores: Mapping[str, Score], order: Sequence[str], groups: Sequence[str]
) -> Figure:
    """Points by which each model differs from the base, by group."""
    own = scores[base].per_group
    rows = [name for name in order if name != base]
    values = [
        [scores[n].per_group[g].value - own[g].value if g in own and g in scores[n].per_group else None for g in groups]
        for n in rows
    ]
    far = max((abs(v) for row in values for v in row if v is not None), default=0.0) or 1.0
    drawing = heat_map(rows, groups, values, title=title, low=-far, high=far, percent=True, signed=True)
    return Figure(title, drawing, f"Percentage points above (below) {base}: what was learnt, and what was forgotten.")


def lineage_graph(lineages: Mapping[str, Lineage]) -> Graph:
    """What was made from what. Fine-tunes stand behind their base, which the merges that name it read as well."""
    kinds = _kinds(lineages)
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], Edge] = {}
    for lineage in lineages.values():
        for record in sorted(lineage.inputs, key=lambda r: r.role != "base"):
            detail = " · ".join(part for part in (record.ref, record.digest[:8]) if part)
            nodes.setdefault(record.name, Node(record.name, record.name, detail, kinds[record.name]))
    for name, lineage in lineages.items():
        told = [] if name.split("@")[0] == lineage.method else [lineage.method]
        told += [option for option in brief_options(lineage) if option.replace(" ", "=") not in name]
        nodes[name] = Node(name, name, " · ".join([*told, lineage.key[:8]]), "merge")
        base = next((r.name for r in lineage.inputs if r.role == "base"), None)
        models = [r.name for r in lineage.inputs if r.role != "base"]
        for model in models or ([base] if base else []):
            edges[model, name] = Edge(model, name)
            if base is not None and model != base and kinds[model] == "model":
                edges[base, model] = Edge(base, model)
    caption = (
        "From what was read to what was made; fine-tunes stand behind the base that they came from. The last word "
    )
    caption += "in a box is the start of the model's digest or content key."
    legend = [pair for pair in KINDS if any(n.kind == pair[0] for n in nodes.values())]
    return Graph("Lineage", list(nodes.values()), list(edges.values()), caption, legend)


def lineage_table(lineages: Mapping[str, Lineage]) -> Table:
    """The same in words, with options, content keys and times."""
    columns = [Column("model"), Column("method"), Column("made from"), Column("content key")]
    columns.append(Column("seconds", digits=2))
    rows: list[list[Cell | float | str | None]] = []
    for name, lineage in lineages.items():
        base = [r.name for r in lineage.inputs if r.role == "base"]
        models = ", ".join(r.name for r in lineage.inputs if r.role != "base")
        made_from = Cell(models, note=f"base: {base[0]}" if base else "")
        how = Cell(lineage.method, note=", ".join(brief_options(lineage)))
        rows.append([name, how, made_from, lineage.key[:12], lineage.wall_seconds])
    caption = "Options are named where they differ from the defaults. Equal content keys mean equal weights."
    return Table("How each model was made", columns, rows, caption)


def delta_figures(lineages: Mapping[str, Lineage]) -> list[Section]:
    """Cosines between task vectors, and their norms by layer, from the first merge that measured the most models."""
    measured = [lineage.diagnostics for lineage in lineages.values() if lineage.diagnostics.get("models")]
    if not measured:
        return []
    facts = max(measured, key=lambda d: len(d["models"]))
    names: list[str] = facts["models"]
    parts: list[Section] = []
    if len(names) > 1 and facts.get("cosine"):
        drawing = heat_map(names, names, facts["cosine"], title="Cosines between task vectors", low=-1.0, high=1.0)
        caption = "Cosine of the angle between task vectors (fine-tune minus base): near 0 they hardly interfere."
        parts.append(Figure("Cosines of task vectors", drawing, caption))
    layers = facts.get("layers") or []
    if len(layers) > 1:
        labels = [f"{layer['stack']} {layer['layer']}".strip() for layer in layers]
        norms = [[layer["norms"][i] for layer in layers] for i in range(len(names))]
        title, caption = (
            "Change by layer",
            "L2 norm of the change that each fine-tune made to the weights of each layer.",
        )
        if len(layers) < 4:
            top = max(max(row) for row in norms)
            drawing = heat_map(names, [f"layer {label}" for label in labels], norms, title=title, high=top)
        else:
            series = dict(zip(names[:8], norms, strict=False))
            drawing = lines(series, labels, title=title, y_title="L2 norm of the change", x_title="layer")
        parts.append(Figure(title, drawing, caption))
    return parts


def brief_options(lineage: Lineage) -> list[str]:
    """Options that differ from the method's defaults, such as "lambda 0.4"; "varied" where tensors differ."""
    if not lineage.options:
        return []
    fields = method(lineage.kind, lineage.method).options
    defaults = {
        k: fields.model_fields[a].get_default(call_default_factory=True) for k, a in field_names(fields).items()
    }
    found = []
    for name in lineage.options[0].options:
        values = [_plain(group.options.get(name)) for group in lineage.options]
        if any(value != values[0] for value in values):
            found.append(f"{name} varied")
        elif values[0] != _plain(defaults.get(name)):
            found.append(f"{name} {_words(values[0])}")
    return found


def _plain(value: Any) -> Any:
    """One value for one per model, where they are the same."""
    if isinstance(value, (list, tuple)):
        return value[0] if value and all(v == value[0] for v in value) else list(value)
    return value


def _words(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kinds(lineages: Mapping[str, Lineage]) -> dict[str, str]:
    kinds = {r.name: "model" for lineage in lineages.values() for r in lineage.inputs}
    kinds |= {r.name: "base" for lineage in lineages.values() for r in lineage.inputs if r.role == "base"}
    return kinds | dict.fromkeys(lineages, "merge")
