"""What a run measured of a model it made goes into that model's lineage and card, beside its parents' scores."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.checkpoint.card import write_card
from regraft.checkpoint.lineage import Lineage, Score

if TYPE_CHECKING:
    from regraft.recipe.making import MakePlan
    from regraft.recipe.merge_plan import MergePlan
    from regraft.recipe.plan import Members


@dataclass(frozen=True)
class Evaluation:
    """One score: which metric of which model on which data."""

    step: str
    metric: str
    model: str
    data: str
    score: Mapping[str, Any]


def record_scores(
    plan: MergePlan | MakePlan, folder: Path, members: Members, evaluations: Iterable[Evaluation]
) -> None:
    """Write the scores of the model in `folder` into its regraft.json and README.md, unless they are there already."""
    found = list(evaluations)
    parents = [m.name for m in plan.parents]
    scores = [
        Score(
            metric=own.metric,
            data=Path(own.data).name,
            before={e.model: e.score["value"] for e in found if e.step == own.step and e.model in parents},
            after=own.score["value"],
            higher_is_better=own.score["higher_is_better"],
        )
        for own in found
        if own.model == plan.step.name
    ]
    lineage = Lineage.read(folder)
    if not scores or lineage.scores == scores:
        return
    lineage.scores = scores
    checkpoints = [members.get(name).checkpoint for name in parents]
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        told = Path(temporary)
        if (folder / "modules.json").is_file():  # by which the card knows a sentence encoder
            (told / "modules.json").write_bytes((folder / "modules.json").read_bytes())
        files = [
            lineage.write(told),
            write_card(told, lineage, checkpoints, recipe=lineage.recipe, name=plan.step.name, registered=plan.rule),
        ]
        for path in files:
            path.replace(folder / path.name)
