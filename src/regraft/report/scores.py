"""What was measured: tables with the best marked, bars with intervals, gains over the base, curves of sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from regraft.inspect.metric import Answer, Score
from regraft.report.charts import Bar, bars, heat_map
from regraft.report.curves import Point, curves
from regraft.report.frame import STYLES
from regraft.report.lineage import KINDS
from regraft.report.sections import Cell, Column, Figure, Section, Table

SHARES = ("accuracy", "f1", "knn", "linear_probe")  # metrics that are shown times 100
_PART = re.compile(r",(?=[A-Za-z_]\w*=)")


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


def by_step(evaluations: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Evaluations by the step that made them, in order."""
    steps: dict[str, list[Scored]] = {}
    for one in evaluations:
        steps.setdefault(one.step, []).append(one)
    return steps


def score_sections(title: str, evaluations: Sequence[Scored], kinds: Mapping[str, str]) -> list[Section]:
    """One step's scores: a table with the best marked, bars with intervals, and a heat map over groups."""
    scores = {e.model: Score.model_validate(e.score) for e in evaluations}
    first = next(iter(scores.values()))
    groups = list(dict.fromkeys(g for score in scores.values() for g in score.per_group))
    share = is_share(evaluations[0].metric, scores.values())
    # Without labels the value of a probe says how sure a model is, not how good.
    judged = is_judged(first)
    better = ("high" if first.higher_is_better else "low") if judged else None
    style: dict[str, Any] = {"better": better, "percent": share, "digits": 1 if share else 3}
    columns = [Column("model"), Column(f"{evaluations[0].metric}{' %' * share}", **style)]
    columns += [Column(g, **style, shade=first.higher_is_better) for g in groups]
    order = [name for kind, _ in KINDS for name in scores if kinds.get(name, "model") == kind]
    rows = []
    for name in order:
        own = scores[name]
        per_group = [own.per_group[g].value if g in own.per_group else None for g in groups]
        rows.append([name, Cell(own.value, own.interval), *per_group])
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


def is_judged(score: Score) -> bool:
    """Whether a higher or lower score means a better model."""
    return not score.answers or any(answer.truth is not None for answer in score.answers)


def is_share(metric: str, scores: Iterable[Score]) -> bool:
    """Whether the metric is a share of right answers, or a mean of such, shown times 100."""
    return metric in SHARES and all(0 <= one.value <= 1 for one in scores)


def sweep_figures(evaluations: Iterable[Scored]) -> list[Section]:
    """How a score depends on what was swept: a curve per step for one number, a heat map for two."""
    parts: list[Section] = []
    steps = by_step(evaluations)
    for step, scored in steps.items():
        after = f" ({step})" if len(steps) > 1 else ""
        single: dict[str, dict[str, list[Point]]] = {}
        share = is_share(scored[0].metric, [Score.model_validate(e.score) for e in scored])
        for stem, members in _sweeps(scored).items():
            keys = [key for key in members[0][0] if len({values[key] for values, _ in members}) > 1]
            if len(keys) == 1:
                points = [Point(values[keys[0]], one.value, one.interval) for values, one in members]
                single.setdefault(keys[0], {})[stem] = sorted(points, key=lambda p: p.x)
            elif len(keys) == 2:
                parts.append(_grid(f"Sweep of {stem}{after}", keys, members, share))
        y_title = scored[0].metric + ", %" * share
        for key, found in single.items():
            names = list(found)
            for start in range(0, len(names), STYLES):
                group = {name: found[name] for name in names[start : start + STYLES]}
                more = f" ({start // STYLES + 1})" if len(names) > STYLES else ""
                parts.append(_curve(f"Sweep of {key}{after}{more}", key, group, y_title, share))
    return parts


def findings(evaluations: Iterable[Scored], kinds: Mapping[str, str]) -> list[str]:
    """The best model of each step in a sentence; every number is one that was measured."""
    sentences = []
    for step, scored in by_step(evaluations).items():
        scores = {e.model: Score.model_validate(e.score) for e in scored}
        first = next(iter(scores.values()))
        if len(scores) < 2 or not is_judged(first):
            continue
        share = is_share(scored[0].metric, scores.values())
        pick = max if first.higher_is_better else min

        def told(value: float, share: bool = share) -> str:
            return f"{100 * value:.1f} %" if share else f"{value:.4g}"

        best = pick(scores, key=lambda name: scores[name].value)
        spread = scores[best].interval
        within = f" (95 % interval {told(spread[0])} to {told(spread[1])})" if spread else ""
        text = (
            f"{step}: of {len(scores)} models {best} is best by {scored[0].metric}, {told(scores[best].value)}{within}"
        )
        others = [name for name in scores if kinds.get(name, "model") != "merge"]
        if kinds.get(best) == "merge" and others:
            single = pick(others, key=lambda name: scores[name].value)
            text += f"; of those that were there before, {single}, {told(scores[single].value)}"
        if spread:
            near = [n for n, one in scores.items() if n != best and one.interval and _overlap(one.interval, spread)]
            text += f". The intervals of {len(near)} other models overlap with its own" if near else ""
        sentences.append(text + ".")
    return sentences


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


def _sweeps(scored: Sequence[Scored]) -> dict[str, list[tuple[dict[str, float], Score]]]:
    """Step -> its members with the numbers that were swept; steps without a sweep of numbers are left out."""
    members: dict[str, list[tuple[dict[str, float], Score]]] = {}
    for one in scored:
        stem, at, suffix = one.model.partition("@")
        values: dict[str, float] = {}
        for part in _PART.split(suffix) if at else []:
            key, _, text = part.partition("=")
            try:
                values[key] = float(text)
            except ValueError:
                continue  # a list or a word: no place on an axis
        if values:
            members.setdefault(stem, []).append((values, Score.model_validate(one.score)))
    return {
        stem: found
        for stem, found in members.items()
        if len(found) > 1 and len({tuple(values) for values, _ in found}) == 1
    }


def _curve(title: str, key: str, found: Mapping[str, Sequence[Point]], y_title: str, share: bool) -> Figure:
    drawing = curves(found, title=title, x_title=key, y_title=y_title, percent=share)
    style: dict[str, Any] = {"percent": share, "digits": 1 if share else 3}
    columns = [Column(key, digits=6), *(Column(name, **style) for name in found)]
    at = {name: {p.x: p for p in points} for name, points in found.items()}
    rows: list[list[Cell | float | str | None]] = []
    for x in sorted({p.x for points in found.values() for p in points}):
        cells = [at[name].get(x) for name in found]
        rows.append([f"{x:g}", *(None if p is None else Cell(p.y, p.interval) for p in cells)])
    columns[0] = Column(key)
    caption = "One member of the sweep per dot, with its 95 % interval."
    return Figure(title, drawing, caption, Table(title, columns, rows))


def _grid(title: str, keys: Sequence[str], members: Sequence[tuple[dict[str, float], Score]], share: bool) -> Figure:
    rows, columns = (sorted({values[key] for values, _ in members}) for key in keys)
    found = {(values[keys[0]], values[keys[1]]): one.value for values, one in members}
    cells = [[found.get((r, c)) for c in columns] for r in rows]
    low, high = min(found.values()), max(found.values())
    names = [f"{keys[0]} {r:g}" for r in rows], [f"{keys[1]} {c:g}" for c in columns]
    drawing = heat_map(*names, cells, title=title, low=low, high=high, percent=share, form=".3g")
    style: dict[str, Any] = {"percent": share, "digits": 1 if share else 3}
    body: list[list[Cell | float | str | None]] = [[n, *row] for n, row in zip(names[0], cells, strict=True)]
    table = Table(title, [Column(keys[0]), *(Column(name, **style) for name in names[1])], body)
    return Figure(title, drawing, "One member of the sweep per cell.", table)


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
    body: list[list[Cell | float | str | None]] = [[n, *row] for n, row in zip(rows, values, strict=True)]
    table = Table(title, [Column("model"), *(Column(g, percent=True) for g in groups)], body)
    caption = f"Percentage points above (below) {base}: what was learnt, and what was forgotten."
    return Figure(title, drawing, caption, table)
