"""Steps that make a model by running one (`compress`, `train`): planned with what can be known, then done and written.

Training keeps its checkpoints beside the artefact while it lasts, so that a run that was stopped goes on from there;
the artefact itself appears whole, as that of a merge does.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.adapters.folder import WEIGHTS
from regraft.checkpoint import Checkpoint, open_checkpoint, read_safetensors
from regraft.checkpoint.card import AdapterFacts, write_card
from regraft.checkpoint.dtypes import dtype_name, torch_name
from regraft.checkpoint.licences import LicenceVerdict, combine
from regraft.checkpoint.lineage import InputRecord, Lineage, OptionGroup, Output
from regraft.checkpoint.output import OutputFolder
from regraft.checkpoint.sidecars import copy_licences, copy_sidecars, copy_tokenizer
from regraft.checkpoint.tensor import stored_dtype
from regraft.checkpoint.writer import TensorSpec
from regraft.errors import UserError
from regraft.methods import Options, method
from regraft.recipe.document import MakeStep, Recipe
from regraft.recipe.file_states import data_files, pictures_beside
from regraft.recipe.fit import Member
from regraft.recipe.planned import PlannedCheckpoint, PlannedTensor
from regraft.recipe.progress import Progress
from regraft.recipe.settings import Settings
from regraft.train import processes
from regraft.train.processes import Team

if TYPE_CHECKING:
    pass

FORMAT = 1


@dataclass
class MakePlan:
    """A step that will run a maker, validated.

    Attributes:
        members: role -> model.
        data: the data's path, None if the step names none.
        sources: the paths of further data, by name.
        key: content address: the same models, data and options give the same key.
    """

    step: MakeStep
    maker: Any
    options: Options
    members: Mapping[str, Member]
    data: Path | None
    key: str
    licence: LicenceVerdict
    warnings: list[str] = field(default_factory=list)
    sources: Mapping[str, Path] = field(default_factory=dict)

    @property
    def parents(self) -> list[Member]:
        return list({id(m.checkpoint): m for m in self.members.values()}.values())

    @property
    def rule(self) -> Any:
        """The method, under the name that plans of merges have for it."""
        return self.maker

    @property
    def bytes_out(self) -> int:
        """At most: a model of the same size, and two checkpoints with two moments of every weight while it trains; of
        each run that is done, if there are several, one."""
        trains = "max_steps" in type(self.options).model_fields
        models = 1 + (3 + 3 * self.maker.runs(self.options) if trains else 0)
        return self.members["model"].checkpoint.bytes * models

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter for the model, not a model."""
        return bool(self.maker.adapter(self.options))

    def as_checkpoint(self) -> PlannedCheckpoint:
        """The output as later steps may plan with it; its tensors are known only if they are those of the model."""
        source = self.members["model"].checkpoint
        tensors: dict[str, Any] = {}
        config = dict(source.config)
        if self.maker.same_tensors(self.options):
            tensors = {
                name: PlannedTensor(TensorSpec(name, t.shape, stored_dtype(t))) for name, t in source.tensors.items()
            }
        else:
            config["regraft"] = {"planned": self.step.verb}
        return PlannedCheckpoint(self.step.name, source.path, tensors, {}, config, dict(source.files), key=self.key)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "step": self.step.name,
            self.step.verb: self.maker.name,
            "models": {role: member.name for role, member in self.members.items()},
            "data": self.step.data or None,
            **self.step.sources,
            "options": self.options.model_dump(mode="json"),
            "licence": self.licence.licence,
            "key": self.key,
            "warnings": self.warnings,
        }


def plan_make(step: MakeStep, members: Mapping[str, Member], recipe: Recipe, settings: Settings) -> MakePlan:
    """Check a step against its models and data.

    Raises:
        UserError: RG304 and RG601 for what is missing, RG303 for options, RG602 for a model that has no folder.
    """
    maker = method(step.verb, step.method, where=step.where)
    chosen = dict(step.options)
    if settings.seed is not None and "seed" in maker.options.model_fields:
        chosen["seed"] = settings.seed
    options = maker.resolve(chosen, where=step.where)
    data = _data_at(step.data, step, recipe) if step.data else None
    sources = {name: _data_at(text, step, recipe) for name, text in step.sources.items()}
    maker.check(members, data, where=step.where)
    for member in members.values():
        if member.checkpoint.adapters:
            what = f"{member.name} is a model with an adapter, which has no folder of its own"
            fix = "merge it alone in a passthrough step and name that step"
            raise UserError("RG602", what, where=step.where, fix=fix)
    facts = {
        "format": FORMAT,
        "verb": step.verb,
        "method": maker.name,
        "options": options.model_dump(mode="json"),
        "models": {role: member.checkpoint.digest() for role, member in members.items()},
        "data": data_key(data) if data is not None else None,
        **({"sources": {name: data_key(path) for name, path in sources.items()}} if sources else {}),
    }
    key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
    licence = combine([m.checkpoint for m in {id(m.checkpoint): m for m in members.values()}.values()])
    return MakePlan(step, maker, options, members, data, key, licence, sources=sources)


def _data_at(text: str, step: MakeStep, recipe: Recipe) -> Path:
    """The path that a step names, relative to its recipe. Raises RG601 if nothing is there."""
    path = (recipe.path.parent if recipe.path else Path()) / Path(text).expanduser()
    if not path.exists():
        raise UserError("RG601", f"no data at {text!r}", where=step.where, fix="give the path of a data file")
    return path


def make(
    plan: MakePlan, out: Path, recipe: Recipe, settings: Settings, progress: Progress, team: Team | None = None
) -> Lineage:
    """Make the model of a plan at `out`.

    All processes of a team train; the first of them writes, and only its lineage is whole.

    Raises:
        UserError: whatever the maker raises, RG401 to RG405 for the output.
        KeyboardInterrupt: after Ctrl-C in training, with a sentence on what is kept.
    """
    from regraft.resize import surgery
    from regraft.train import board
    from regraft.train.making import Work

    lineage = Lineage(
        kind=plan.step.verb,
        step=plan.step.name,
        method=plan.maker.name,
        recipe=recipe.text,
        key=plan.key,
        inputs=[InputRecord.sampled(m.checkpoint, m.name, role) for role, m in plan.members.items()],
        settings={"data": plan.step.data, **plan.step.sources},
        options=[OptionGroup(options=plan.options.model_dump(mode="json"), tensors=["*"], count=1)],
        sources={"config": plan.members["model"].name, "tokenizer": plan.members["model"].name},
        licence=plan.licence.licence,
    )
    seed = getattr(plan.options, "seed", None)
    if seed is not None:
        lineage.seeds = {plan.step.verb: seed}
    source = plan.members["model"].checkpoint
    work_folder = out.with_name(f"{out.name}.work")

    def tell(step: int, steps: int, figures: Mapping[str, float]) -> None:
        progress.advance(step, steps)
        progress.figures(figures)

    work = Work(
        {role: m.checkpoint.path for role, m in plan.members.items()},
        plan.options, plan.data, work_folder, key=plan.key,
        device="cpu" if settings.device == "cpu" else "auto", tell=tell,
        message=lambda text: progress.message(f"{plan.step.name}: {text}"), sources=plan.sources,
    )  # fmt: skip
    team = team or Team()
    if not team.first:
        plan.maker.run(work)
        team.meet()
        return lineage
    with OutputFolder(out, force=settings.force) as folder:
        try:
            made = plan.maker.run(work)
        except BaseException:
            if not any(_worth_keeping(path) for path in work_folder.rglob("*")):
                shutil.rmtree(work_folder, ignore_errors=True)  # nothing to go on from
            raise
        team.meet()  # the folder of the work goes away below, when nobody needs it
        facts = None
        if made.adapter is not None:
            facts = _write_adapter(folder.staging, made, source, lineage)
        else:
            dtype = torch_name(dtype_name(next(made.model.parameters()).dtype))
            copy_sidecars(folder.staging, config_from=source, tokenizer_from=source, config_changes={}, dtype=dtype)
            surgery.save(made.model, folder.staging)
            lineage.surgeries = surgery.surgeries_of(made.model.config)
            lineage.output = _output(folder.staging, made.model, dtype)
        copy_licences(folder.staging, [m.checkpoint for m in plan.parents])
        for name, text in made.files.items():
            (folder.staging / name).write_text(text, encoding="utf-8")
        board.publish(work_folder, folder.staging)
        lineage.diagnostics = made.diagnostics
        lineage.warnings = [*plan.warnings, *made.warnings]
        lineage.finish()
        lineage.write(folder.staging)
        name = plan.step.name if out.parent.name == "artefacts" else out.name
        parents = [m.checkpoint for m in plan.members.values()]
        write_card(
            folder.staging, lineage, parents, recipe=recipe.text, name=name, registered=plan.maker, adapter=facts
        )
        folder.publish()
    if work_folder.exists():
        shutil.rmtree(work_folder)
    for warning in lineage.warnings:
        progress.message(f"note: {plan.step.name}: {warning}")
    return lineage


def _worth_keeping(path: Path) -> bool:
    """Whether a run that is given again goes on from this: a checkpoint, or a stage that is done."""
    from regraft.train.stages import DONE

    return path.name.startswith(("checkpoint-", DONE))


def _write_adapter(staging: Path, made: Any, base: Checkpoint, lineage: Lineage) -> AdapterFacts:
    """The files of an adapter, with the tokenizer that it was trained with; what the card says of it."""
    from regraft.train.lora import save_adapter

    save_adapter(made.adapter, staging, base=base.repo_id or base.ref, revision=base.revision or None)
    copy_tokenizer(staging, base)
    tensors, _ = read_safetensors(staging / WEIGHTS)
    lineage.output = Output(
        tensors=len(tensors),
        parameters=sum(math.prod(one.shape) for one in tensors.values()),
        bytes=(staging / WEIGHTS).stat().st_size,
        dtype="float32",
    )
    class_name = type(made.model).__name__
    return AdapterFacts(base, class_name, "A LoRA adapter, trained by `regraft`.", tokenizer=True)


def _output(folder: Path, model: Any, dtype: str) -> Output:
    weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    parameters = list(model.parameters())
    return Output(
        tensors=len(parameters),
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(path.stat().st_size for path in weights),
        dtype=dtype,
    )


def open_made(folder: Path) -> Checkpoint:
    """The result of such a step as a model."""
    return open_checkpoint(str(folder))


def data_key(path: Path) -> list[Any]:
    """What names the data: its bytes, and size and time of the images that a file's rows may name."""
    files = data_files(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    if path.is_file():
        for picture in pictures_beside(path):
            status = picture.stat()
            digest.update(f"{picture.relative_to(path.parent)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return [len(files), digest.hexdigest()]


def make_one(recipe: Recipe, out: Path, settings: Settings, progress: Progress) -> Lineage:
    """Do the only step of a recipe, which makes a model by running one, at `out`.

    Raises:
        UserError: whatever planning and making raise; RG401 for an output that is taken.
    """
    from regraft.recipe.plan import make_plan

    (step,) = recipe.steps
    planned = make_plan(recipe, settings, out=out)
    (plan,) = planned.steps
    assert isinstance(plan, MakePlan)
    for member in plan.parents:
        source = member.checkpoint.path.resolve()
        if out.resolve() == source or out.resolve() in source.parents:
            what = f"the output is the folder of {member.name}, or one above it"
            raise UserError("RG401", what, where=str(out), fix="name another output")
    progress.step(step.name)
    team = team_of(settings)
    lineage = make(plan, out, recipe, settings, progress, team)
    team.meet()
    return lineage


def team_of(settings: Settings) -> Team:
    """The processes that this one makes models with."""
    return processes.team("cpu" if settings.device == "cpu" else "auto")


def export(folder: Path, out: Path, *, force: bool = False) -> Lineage:
    """Fold a compressed model into its stock architecture, with everything else that is in its folder.

    Raises:
        UserError: RG309 for a model that is not compressed, RG101 to RG105 for one that cannot be loaded, RG401 to
            RG405 for the output.
    """
    from regraft.resize import surgery

    checkpoint = open_checkpoint(str(folder))
    if not surgery.surgeries_of(checkpoint.config):
        raise UserError("RG309", "the model is dense already", where=str(folder), fix="use it as it is")
    with OutputFolder(out, force=force) as output:
        model = surgery.load(folder)
        dense = surgery.export(model)
        dtype = torch_name(dtype_name(dense.dtype))
        copy_sidecars(output.staging, config_from=checkpoint, tokenizer_from=checkpoint, config_changes={}, dtype=dtype)
        copy_licences(output.staging, [checkpoint])
        surgery.save(dense, output.staging)
        lineage = Lineage(
            kind="export",
            method="export",
            inputs=[InputRecord.sampled(checkpoint, folder.name, "model")],
            output=_output(output.staging, dense, dtype),
            licence=combine([checkpoint]).licence,
        )
        lineage.finish()
        lineage.write(output.staging)
        output.publish()
    return lineage
