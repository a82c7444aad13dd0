"""What lies in the folder of a run: models with their records, scores, training logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft.checkpoint.json_file import malformed_field, read_json
from regraft.checkpoint.lineage import FILE_NAME, Lineage
from regraft.errors import UserError
from regraft.inspect.metric import Score
from regraft.report.training import Log, read_logs, recorded_logs

SCORES = "scores.json"


@dataclass(frozen=True)
class Measured:
    """One score of scores.json: which metric of which model on which data."""

    step: str
    metric: str
    model: str
    data: str
    score: Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """A run as it lies on the disk.

    Attributes:
        path: the folder.
        artefacts: name of the step -> folder of the model that it made, in the order in which they were made.
        evaluations: of scores.json, in order.
        logs: of training.
        remarks: what was found and could not be used.
    """

    path: Path
    artefacts: dict[str, Path] = field(default_factory=dict)
    evaluations: list[Measured] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFolder:
    """Look through the folder of `regraft run`, of one model that regraft made, or of a training.

    Raises:
        UserError: RG603 if there is nothing to tell of, RG105 for a record or scores that are malformed.
    """
    if not folder.is_dir():
        fix = "name the folder that regraft run or merge made, or that of a training"
        raise UserError("RG603", "there is no such folder", where=str(folder), fix=fix)
    remarks: list[str] = []
    run = collect(folder, _artefacts(folder, remarks), _scores(folder / SCORES), remarks)
    if not (run.artefacts or run.evaluations or run.logs):
        what = "the folder holds no model that regraft made, no scores and no log of a training"
        raise UserError("RG603", what, where=str(folder), fix="name the folder that regraft run or merge made")
    return run


def collect(
    folder: Path, artefacts: Mapping[str, Path], evaluations: Iterable[Any], remarks: Sequence[str] = ()
) -> RunFolder:
    """A run whose models and scores are known: the evaluations that it returned, or those of its folder.

    Raises:
        UserError: RG105 for a record that is malformed.
    """
    made = {name: path for name, path in artefacts.items() if path != folder}
    records = {name: Lineage.read(path).diagnostics for name, path in artefacts.items()}
    logs = recorded_logs(records) + read_logs({folder.resolve().name: folder} | made)
    scores = [Measured(e.step, e.metric, e.model, e.data, e.score) for e in evaluations]
    told = [*remarks, *(remark for log in logs for remark in log.remarks)]
    return RunFolder(folder, dict(artefacts), scores, [log for log in logs if log.metrics], told)


def _artefacts(folder: Path, remarks: list[str]) -> dict[str, Path]:
    candidates = [folder] if (folder / FILE_NAME).is_file() else []
    beside = folder.with_name(folder.name + ".steps")  # earlier steps of `regraft merge`
    for place in (folder, beside) if candidates else (folder,):
        if place.is_dir():
            candidates += sorted(p for p in place.iterdir() if (p / FILE_NAME).is_file() and not p.name.startswith("."))
            for link in sorted(place.iterdir()):
                if link.is_symlink() and not link.exists():
                    remarks.append(f"{link.name} leads to a model that is not there any more")
    if not candidates and (folder / "artefacts").is_dir():  # the links are lost, as in a copy without them
        candidates = sorted(p for p in (folder / "artefacts").iterdir() if (p / FILE_NAME).is_file())
    dated = []
    for path in candidates:
        lineage = Lineage.read(path)
        dated.append((lineage.started, lineage.step or path.name, path))
    return {name: path for _, name, path in sorted(dated, key=lambda found: (found[0], found[1]))}


def _scores(path: Path) -> list[Measured]:
    if not path.is_file():
        return []
    found = []
    for entry in read_json(path, list):
        try:
            if not isinstance(entry, dict):
                raise TypeError
            one = Measured(**{key: entry[key] for key in ("step", "metric", "model", "data", "score")})
            Score.model_validate(one.score)
        except ValidationError as error:
            raise _malformed(path, malformed_field(error)) from None
        except (KeyError, TypeError):
            raise _malformed(path, "an entry lacks its step, metric, model, data or score") from None
        found.append(one)
    return found


def _malformed(path: Path, what: str) -> UserError:
    return UserError("RG105", what, where=str(path), fix="run the recipe again")
