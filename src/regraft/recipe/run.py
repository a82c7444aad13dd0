"""Doing what a plan says: artefacts by content key, so that what is done is not done again.

`regraft run` keeps every step's model in `OUT/artefacts/<step>-<key>` and links it as `OUT/<step>`; a step whose key is
there already is taken as it is, and a changed option changes the keys of what depends on it, of nothing else.
`regraft merge` puts the last step's model at OUT itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from regraft.adapters.factors import Truncation
from regraft.checkpoint import Checkpoint, open_checkpoint
from regraft.checkpoint.delta import check_bases
from regraft.checkpoint.lineage import FILE_NAME, Lineage
from regraft.checkpoint.output import clear_leftovers, unfinished_in
from regraft.checkpoint.paths import WEIGHT_SUFFIXES
from regraft.errors import UserError, nearest
from regraft.recipe.document import OUTPUTS, STATE_DICT, EvaluateStep, MakeStep, MergeStep, Recipe
from regraft.recipe.execute import execute
from regraft.recipe.execute_adapter import is_adapter, open_result, write_adapter
from regraft.recipe.fit import Member
from regraft.recipe.making import MakePlan, data_key, make, plan_make, team_of
from regraft.recipe.merge_plan import MergePlan, plan_merge
from regraft.recipe.plan import Members, Plan, fold, make_plan, size_run
from regraft.recipe.progress import Progress, Silent
from regraft.recipe.scores import Evaluation, record_scores
from regraft.recipe.settings import Settings
from regraft.train.processes import Team

__all__ = ["Evaluation", "Progress", "RunResult", "merge", "run"]


@dataclass
class RunResult:
    """What a run left behind: `artefacts` by step name, in order, and all scores."""

    out: Path
    plan: Plan
    artefacts: dict[str, Path] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)


def run(recipe: Recipe, out: Path, settings: Settings | None = None, progress: Progress | None = None) -> RunResult:
    """Do all steps of a recipe; what a former run has done is not done again.

    Args:
        recipe: from `load_recipe` or `parse_recipe`.
        out: folder for artefacts, links and scores; made if it does not exist.
        settings, progress: switches, and who listens.

    Raises:
        UserError: before any work starts if the recipe cannot be run; during it if a source turns out to be bad.
    """
    settings, progress = settings or Settings(), progress or Silent()
    plan = make_plan(recipe, settings, out=out)
    _tell(plan, progress)
    store = _Store(out)
    members = plan.members.afresh()
    result = RunResult(out, plan)
    team = team_of(settings)
    for step in recipe.steps:
        progress.step(step.name)
        if isinstance(step, EvaluateStep):
            if team.first:
                result.evaluations += _evaluate(step, plan, members, store, settings, progress)
            team.meet()
            continue
        folder, made = _artefact(step, recipe, members, store, settings, progress, team)
        result.artefacts[step.name] = folder
        if team.first:
            store.link(step.name, folder)
        members.planned[step.name] = Member(step.name, made)
    if not team.first:
        return result
    store.write("scores.json", [asdict(e) for e in result.evaluations])
    for planned in plan.makes:
        record_scores(planned, result.artefacts[planned.step.name], members, result.evaluations)
    for unfinished in unfinished_in(out / "artefacts"):
        clear_leftovers(unfinished)  # of an earlier form of the recipe
    return result


def merge(recipe: Recipe, out: Path, settings: Settings | None = None, progress: Progress | None = None) -> Path:
    """Make the model of a recipe's last step at `out`; earlier steps are kept in `OUT.steps` beside it.

    Raises:
        UserError: RG309 if the recipe makes several final models or measures something, which `run` is for; RG401 if
            `out` holds something else; else as `run`.
    """
    settings, progress = settings or Settings(), progress or Silent()
    plan = check_merge(recipe, out, settings)
    final = only_result(recipe)
    members = plan.members.afresh()
    _tell(plan, progress)
    store = _Store(out.with_name(out.name + ".steps"))
    for step in recipe.steps:
        assert isinstance(step, MergeStep)
        progress.step(step.name)
        if step is not final:
            _, made = _artefact(step, recipe, members, store, settings, progress)
            members.planned[step.name] = Member(step.name, made)
            continue
        chosen = plan_merge(step, members.of(step), settings)
        if _key_at(out) == chosen.key:
            clear_leftovers(out)
            progress.message(f"{out} is up to date")
            return out
        if not settings.force and out.exists() and any(out.iterdir()):
            raise _not_empty(out)
        _make(chosen, out, recipe, settings, progress)
    return out


def check_merge(recipe: Recipe, out: Path, settings: Settings | None = None) -> Plan:
    """The plan of `merge`, with everything checked that can be checked without work; raises as `merge` does."""
    settings = settings or Settings()
    only_result(recipe)
    plan = make_plan(recipe, settings, out=out)
    _check_output(out, plan, settings)
    return plan


def with_output(
    recipe: Recipe, output: str | None, rank: int | None, energy: float | None, max_rank: int | None
) -> Recipe:
    """The recipe whose last model is made as the command line says; what it leaves open stays as it is.

    Raises:
        UserError: RG303 for another output than those of `OUTPUTS`, and for ranks of something else than an adapter.
    """
    final = only_result(recipe)
    chosen = output or final.output
    if chosen not in OUTPUTS:
        raise UserError("RG303", f"--output is {chosen!r}", fix=nearest(chosen, OUTPUTS))
    cut = final.cut
    if (rank, energy, max_rank) != (None, None, None):
        if chosen != "lora":
            raise UserError("RG303", "--rank and --energy are for adapters", fix="add --output lora, or leave them out")
        cut = Truncation(rank, energy, max_rank)
    changed = replace(final, output=chosen, cut=cut)
    return replace(recipe, steps=tuple(changed if step is final else step for step in recipe.steps))


def only_result(recipe: Recipe) -> MergeStep:
    """The merge that nothing else in the recipe uses; RG309 if there are several, or something is measured."""
    measured = [s for s in recipe.steps if isinstance(s, EvaluateStep)]
    if measured:
        what = f"the recipe also measures ({measured[0].name}), and merge makes one model"
        raise UserError("RG309", what, where=measured[0].where, fix="use: regraft run")
    trained = [s for s in recipe.steps if isinstance(s, MakeStep)]
    if trained:
        what = f"the recipe also has a step with {trained[0].verb} ({trained[0].name}), and merge only merges"
        raise UserError("RG309", what, where=trained[0].where, fix="use: regraft run")
    steps = [s for s in recipe.steps if isinstance(s, MergeStep)]
    used = {name for s in steps for name in s.references}
    results = [s for s in steps if s.name not in used]
    if len(results) != 1:
        names = ", ".join(s.name for s in results)
        what = f"the recipe makes {len(results)} final models ({names}), and merge makes one"
        raise UserError("RG309", what, where=results[0].where if results else "", fix="use: regraft run")
    return results[0]


def _check_output(out: Path, plan: Plan, settings: Settings) -> None:
    resolved = out.resolve()
    if only_result(plan.recipe).output == STATE_DICT and out.name.endswith(WEIGHT_SUFFIXES):
        what = "the output is a folder, with the tensors in model.safetensors, and its name is that of a file"
        raise UserError("RG405", what, where=str(out), fix=f"name it {out.with_suffix('')}")
    for step in plan.merges:
        for member in step.parents:
            for folder in (member.checkpoint.path, *member.checkpoint.folders):
                source = folder.resolve()
                if resolved == source or resolved in source.parents:
                    what = f"the output is the folder of {member.name}, or one above it"
                    raise UserError("RG401", what, where=str(out), fix="name another output")
    if out.exists() and not out.is_dir():
        raise UserError("RG401", "the output is a file", where=str(out), fix="name a folder that does not exist yet")
    if settings.force or not out.exists() or not any(out.iterdir()):
        return
    final = plan.merges[-1]
    if len(plan.merges) == 1 and _key_at(out) == final.key:
        return
    if (out / FILE_NAME).exists() and len(plan.merges) > 1:
        return  # whether it is up to date is known when the earlier steps are done
    raise _not_empty(out)


def _not_empty(out: Path) -> UserError:
    is_model = (out / "config.json").exists() or (out / FILE_NAME).exists()
    fix = "name another folder" + (", or give --force to replace the model in it" if is_model else "")
    return UserError("RG401", "the output folder is not empty", where=str(out), fix=fix)


def _key_at(folder: Path) -> str:
    """The content key of the model or adapter in a folder, "" if there is none or it is not whole."""
    if not (folder / FILE_NAME).exists():
        return ""
    try:
        if not is_adapter(folder):
            open_checkpoint(str(folder))  # headers and sizes must agree
        return Lineage.read(folder).key
    except UserError:
        return ""


def _artefact(
    step: MergeStep | MakeStep,
    recipe: Recipe,
    members: Members,
    store: _Store,
    settings: Settings,
    progress: Progress,
    team: Team = Team(),  # noqa: B008 - it cannot be changed
) -> tuple[Path, Checkpoint]:
    """The folder of a step's result, and that result as a model; the first process of a team makes it."""
    plan: MergePlan | MakePlan
    if isinstance(step, MakeStep):
        plan = plan_make(step, members.of(step), recipe, settings)
    else:
        plan = plan_merge(step, members.of(step), settings)
    folder = store.folder(step.name, plan.key)
    if team.agreed(_key_at(folder) == plan.key):
        if team.first:
            clear_leftovers(folder)
        progress.message(f"{step.name}: done before")
    else:
        if team.first and folder.exists():
            shutil.rmtree(folder)  # our own cache entry, damaged: made again
        if isinstance(plan, MakePlan):
            make(plan, folder, recipe, settings, progress, team)
        elif team.first:
            _make(plan, folder, recipe, settings, progress)
        team.meet()
    if isinstance(plan, MakePlan) and plan.makes_adapter:
        return folder, plan.as_checkpoint()  # no later step may use it
    adapter = isinstance(plan, MergePlan) and plan.combination is not None
    return folder, open_result(plan, folder) if adapter else open_checkpoint(str(folder))  # type: ignore[arg-type]


def _make(plan: MergePlan, out: Path, recipe: Recipe, settings: Settings, progress: Progress) -> None:
    plan.warnings += check_bases([member.checkpoint for member in (*plan.parents, plan.template)], force=settings.force)
    if plan.combination is not None:
        write_adapter(plan, out, recipe, settings, progress)
        return
    workers, chunk = size_run(plan.jobs, settings)
    execute(plan, out, recipe, settings, workers=workers, chunk=chunk, progress=progress)


def _evaluate(
    step: EvaluateStep, plan: Plan, members: Members, store: _Store, settings: Settings, progress: Progress
) -> list[Evaluation]:
    planned = next(s for s in plan.steps if s.step is step)
    found = []
    content = data_key(planned.data) if planned.data is not None else None  # type: ignore[union-attr]
    options = planned.options.model_dump(mode="json")
    for further in planned.metric.files:  # type: ignore[union-attr]
        if options[further] is not None:
            options[further] = data_key(Path(options[further]))  # what is in it, not where it is
    for i, name in enumerate(step.models):
        checkpoint = members.get(name).checkpoint
        facts = [planned.metric.name, options, content, checkpoint.digest()]  # type: ignore[union-attr]
        key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        score = store.score(key)
        if score is None:
            folder = checkpoint.path
            if checkpoint.adapters:
                folder, _ = _artefact(fold(name, step), plan.recipe, members, store, settings, progress)
            score = planned.metric.score(folder, planned.data, planned.options)  # type: ignore[union-attr]
            score = score.model_dump(mode="json") if hasattr(score, "model_dump") else dict(asdict(score))
            store.keep_score(key, score)
        asked = step.data or ", ".join(getattr(planned.options, "tasks", ()))  # type: ignore[union-attr]
        found.append(Evaluation(step.name, planned.metric.name, name, asked, score))  # type: ignore[union-attr]
        progress.advance(i + 1, len(step.models))
    return found


def _tell(plan: Plan, progress: Progress) -> None:
    for warning in plan.warnings:
        progress.message(f"note: {warning}")


class _Store:
    """The folder of a run: `artefacts/`, links to them by step name, and cached scores."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def folder(self, step: str, key: str) -> Path:
        folder = self._out / "artefacts" / f"{re.sub(r'[^A-Za-z0-9._=,@-]+', '_', step)}-{key[:12]}"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the output folder cannot be made: {error.strerror}"
            raise UserError("RG405", what, where=str(self._out), fix="name another output") from None
        return folder

    def link(self, step: str, folder: Path) -> None:
        """`OUT/<step>` points at the artefact; replaced in one step."""
        link = self._out / step.replace("/", "_")
        if link.exists() and not link.is_symlink():
            what = f"{link.name} is in the output folder and was not made by regraft"
            raise UserError("RG401", what, where=str(self._out), fix="name another output")
        temporary = link.with_name(f".{link.name}.link")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(folder, self._out))
        temporary.replace(link)

    def score(self, key: str) -> Any | None:
        path = self._out / "artefacts" / "scores" / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def keep_score(self, key: str, score: Mapping[str, Any]) -> None:
        self.write(f"artefacts/scores/{key}.json", score)

    def write(self, name: str, data: Any) -> None:
        path = self._out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
