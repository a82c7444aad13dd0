"""Training curves, from the logs that training leaves: the record of a model that a step trained, trainer_state.json of
transformers, and JSON lines with a step.

A line of such a log is a mapping with a number called `step` and further numbers; anything else in the folder is no
log, and a log that cannot be read is said to be so and left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.checkpoint.json_file import read_json
from regraft.errors import UserError
from regraft.report.curves import MOST_POINTS, Point, curves, finite, thinned
from regraft.report.frame import STYLES
from regraft.report.sections import Cell, Column, Figure, Section, Table

STATE = "trainer_state.json"
_SKIPPED = re.compile(r"step|epoch|total_flos|.*runtime|.*_per_second|.*timestamp|(.*_)?time")
_SUMMARY = "train_runtime"  # in the entry with which transformers sums a training up
_ROWS = 40  # of a curve's table
_LINE_LIMIT = 1 << 16
_PLOTS = 12  # metrics that get a drawing


@dataclass
class Log:
    """What one training run logged: metric -> points over steps; `remarks` say what could not be used."""

    name: str
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take the numbers of one line."""
        step = entry.get("step")
        if not _number(step) or _SUMMARY in entry:
            return
        for key, value in entry.items():
            if _number(value) and not _SKIPPED.fullmatch(key):
                self.metrics.setdefault(key, []).append(Point(float(step), float(value)))  # type: ignore[arg-type]


def read_logs(folders: Mapping[str, Path]) -> list[Log]:
    """The logs that lie in these folders, by name; of several checkpoints of one training, that of the last."""
    found: list[Log] = []
    for name, folder in folders.items():
        states = [folder / STATE] if (folder / STATE).is_file() else _of_checkpoints(folder)[-1:]
        found += [_of_state(name, path) for path in states]
        for path in sorted([*folder.glob("*.jsonl"), *folder.glob("logs/*.jsonl")]):
            log = _of_lines(name if path.stem in ("log", "training", "metrics") else f"{name}: {path.stem}", path)
            if log is not None:
                found.append(log)
    return [log for log in found if log.metrics or log.remarks]


def recorded_logs(diagnostics: Mapping[str, Mapping[str, Any]]) -> list[Log]:
    """What the records of models tell of their training, by the name of the model."""
    found = []
    for name, facts in diagnostics.items():
        training = facts.get("training")
        history = training.get("history") if isinstance(training, Mapping) else None
        log = Log(name)
        for entry in history if isinstance(history, list) else []:
            if isinstance(entry, Mapping):
                log.add(entry)
        if log.metrics:
            found.append(log)
    return found


def training_sections(logs: Sequence[Log]) -> list[Section]:
    """A drawing per metric, training and evaluation together, and a table of what each training ended with."""
    drawn = [log for log in logs if log.metrics]
    if not drawn:
        return []
    series: dict[str, dict[str, list[Point]]] = {}
    for log in drawn:
        for key, points in log.metrics.items():
            measured = key.startswith("eval_")
            metric = key.removeprefix("eval_").removeprefix("train/").removeprefix("train_")
            name = f"{log.name}, evaluation" if measured else log.name
            of_metric = series.setdefault(metric, {})
            of_metric[f"{name}, {key}" if name in of_metric else name] = points
    order = sorted(series, key=lambda metric: metric != "loss")
    parts: list[Section] = [_ends(drawn)]
    for metric in order[:_PLOTS]:
        long = {name: points for name, points in series[metric].items() if len(finite(points)) > 1}
        names = list(long)
        for start in range(0, len(names), STYLES):
            group = {name: long[name] for name in names[start : start + STYLES]}
            more = f" ({start // STYLES + 1})" if len(names) > STYLES else ""
            parts.append(_figure(f"Training: {metric}{more}", metric, group))
    return parts


def _figure(title: str, metric: str, group: Mapping[str, Sequence[Point]]) -> Figure:
    drawing = curves(group, title=title, x_title="step", y_title=metric)
    long = any(len(points) > MOST_POINTS for points in group.values())
    caption = "Long curves are drawn by the lowest and highest value of each stretch. " if long else ""
    if lost := sum(len(points) - len(finite(points)) for points in group.values()):
        caption += f"{lost} values that are not finite are left out."
    rows: list[list[Cell | float | str | None]] = []
    for name, points in group.items():
        rows += [[name, int(p.x), p.y] for p in thinned(finite(points), _ROWS)]
    table = Table(title, [Column("training"), Column("step"), Column(metric, digits=6, significant=True)], rows)
    return Figure(title, drawing, caption.strip(), table)


def _ends(logs: Sequence[Log]) -> Table:
    """How long each training was, and its last values."""
    metrics = list(dict.fromkeys(key for log in logs for key in log.metrics))[:_PLOTS]
    columns = [
        Column("training"),
        Column("steps"),
        *(Column(f"last {key}", digits=4, significant=True) for key in metrics),
    ]
    rows: list[list[Cell | float | str | None]] = []
    for log in logs:
        last = max(int(p.x) for points in log.metrics.values() for p in points)
        rows.append([log.name, last, *(_last(log.metrics.get(key, ())) for key in metrics)])
    return Table("Training", columns, rows, "The last value that was logged of each.")


def _last(points: Sequence[Point]) -> float | None:
    return points[-1].y if points and math.isfinite(points[-1].y) else None


def _of_checkpoints(folder: Path) -> list[Path]:
    """States in checkpoint-N folders, in order of N."""
    found = [
        (int(m[1]), p) for p in folder.glob(f"checkpoint-*/{STATE}") if (m := re.search(r"-(\d+)$", p.parent.name))
    ]
    return [path for _, path in sorted(found)]


def _of_state(name: str, path: Path) -> Log:
    log = Log(name)
    try:
        history = read_json(path).get("log_history")
    except UserError as error:
        log.remarks.append(f"{name}: {error.what}")
        return log
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, dict):
            log.add(entry)
    return log


def _of_lines(name: str, path: Path) -> Log | None:
    """The log in a file of JSON lines; None if its first line is none of a log, as that of a data file."""
    log = Log(name)
    broken = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(_lines(file)):
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    entry = None
                if not isinstance(entry, dict) or not _number(entry.get("step")):
                    if number == 0:
                        return None
                    broken += 1
                    continue
                log.add(entry)
    except OSError as error:
        log.remarks.append(f"{name}: {path.name} cannot be read: {error.strerror}")
    if broken:
        log.remarks.append(f"{name}: {broken} lines of {path.name} are no entries of a log and were left out")
    return log


def _lines(file: Any) -> Iterable[str]:
    """Lines that are not blank, none longer than a log's line can be."""
    while line := file.readline(_LINE_LIMIT):
        if line.strip():
            yield line


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
