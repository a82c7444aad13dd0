"""`regraft compress` and `regraft train`: one method on one model, without a recipe file; and `regraft export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.progress import TerminalProgress
from regraft.cli.terminal import Terminal
from regraft.cli.words import size_in_words
from regraft.recipe.settings import Settings
from regraft.train import processes

MethodName = Annotated[str, typer.Argument(metavar="METHOD", help="A method; `regraft methods` lists them.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model to start from: a folder, or a Hub id.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the model; it must not exist, or be empty.")]
Data = Annotated[Path | None, typer.Option("--data", metavar="PATH", help="A data file or folder.")]
Teachers = Annotated[
    list[str],
    typer.Option("--teacher", metavar="MODEL", help="The model to learn from; may be repeated where a method says so."),
]
Assignments = Annotated[
    list[str],
    typer.Option("--set", metavar="OPTION=VALUE", help="An option of the method: --set ratio=2; may be repeated."),
]
Compressed = Annotated[str, typer.Argument(metavar="MODEL", help="A folder that holds a compressed model.")]


def compress(
    terminal: Terminal,
    method: MethodName,
    model: Model,
    out: Out,
    data: Data = None,
    assignments: Assignments = [],  # noqa: B006 - typer copies it
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    force: opt.Force = False,
    accept_licenses: opt.AcceptLicenses = False,
    offline: opt.Offline = False,
) -> None:
    """Make a model smaller: low-rank layers, with or without training next to the original."""
    settings = Settings(force=force, accept_licenses=accept_licenses, offline=offline, device=device)
    _make(terminal, "compress", method, {"model": model}, out, data, assignments, settings, as_json)


def train(
    terminal: Terminal,
    method: MethodName,
    model: Model,
    out: Out,
    data: Data = None,
    teacher: Teachers = [],  # noqa: B006 - typer copies it
    assignments: Assignments = [],  # noqa: B006 - typer copies it
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    force: opt.Force = False,
    accept_licenses: opt.AcceptLicenses = False,
    offline: opt.Offline = False,
) -> None:
    """Train a model: on its own loss, or by what a teacher says. Ctrl-C keeps what is done; run it again to go on."""
    from regraft.train.making import roles_for

    settings = Settings(force=force, accept_licenses=accept_licenses, offline=offline, device=device)
    models = {"model": model} | dict(zip(roles_for("teacher", len(teacher)), teacher, strict=True))
    _make(terminal, "train", method, models, out, data, assignments, settings, as_json)


def export(
    terminal: Terminal,
    model: Compressed,
    out: Out,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Fold a compressed model back into its stock architecture, which any loader takes."""
    from regraft.recipe.making import export as fold

    made = fold(Path(model), out, force=force)
    terminal.interrupted = f"{out} is finished"
    if as_json:
        terminal.json({"out": str(out), **made.model_dump(mode="json", include={"output", "diagnostics"})})
    elif not terminal.quiet and made.output is not None:
        text = f"{out}: dense, {made.output.tensors} tensors, {size_in_words(made.output.bytes)}, {made.output.dtype}"
        terminal.out.print(text, markup=False)


def _make(
    terminal: Terminal,
    verb: str,
    method: str,
    models: dict[str, str],
    out: Path,
    data: Path | None,
    assignments: list[str],
    settings: Settings,
    as_json: bool,
) -> None:
    """Write the recipe of one step, and do it."""
    import yaml

    from regraft.recipe import parse_recipe
    from regraft.recipe.making import make_one
    from regraft.recipe.progress import Silent

    body: dict[str, Any] = {verb: method}
    references = {role: f"./{ref}" if "/" not in ref and Path(ref).exists() else ref for role, ref in models.items()}
    body |= {role: role for role in models if not role.startswith("teacher")}
    teachers = [role for role in models if role.startswith("teacher")]
    if teachers:
        body["teacher"] = teachers[0] if len(teachers) == 1 else teachers
    if data is not None:
        body["data"] = str(data)
    text = yaml.safe_dump({"models": references, "steps": {"made": body}}, sort_keys=False, allow_unicode=True)
    document = parse_recipe(text, changes=[f"steps.made.{one}" for one in assignments])
    chosen = opt.on_this_machine(settings)
    terminal.interrupted = (
        f"nothing is in {out} yet; the same command goes on from its last checkpoint, if there is one"
    )
    if processes.rank() > 0:  # launched beside the first one, which says what there is to say
        make_one(document, out, chosen, Silent())
        return
    with TerminalProgress(terminal) as progress:
        lineage = make_one(document, out, chosen, progress)
    terminal.interrupted = f"{out} is finished"
    facts = lineage.model_dump(
        mode="json", include={"method", "key", "output", "licence", "wall_seconds", "warnings", "diagnostics"}
    )
    if as_json:
        terminal.json({"out": str(out), **facts})
    elif not terminal.quiet:
        terminal.out.print("\n".join(in_words(out, facts)), markup=False)


def in_words(out: Path, facts: dict[str, Any]) -> list[str]:
    """What came out, in lines: sizes, and for compressed models what was saved, as far as it was measured."""
    output, found = facts["output"], facts["diagnostics"]
    lines = [f"{out}: {facts['method']}, {output['parameters']:,} parameters, {size_in_words(output['bytes'])}"]
    if (cost := found.get("cost")) is not None:
        before, after = (cost["parameters"][name] for name in ("before", "after"))
        lines.append(f"  parameters  {before:,} -> {after:,} ({after / before:.1%})")
        before, after = (cost["flops"][name] for name in ("before", "after"))
        lines.append(f"  operations  {before:,} -> {after:,} ({after / before:.1%}), batch of {cost['batch']}")
        for size, times in cost["seconds"].items():
            share = times["after"] / times["before"]
            lines.append(
                f"  time        {times['before']:.4g} s -> {times['after']:.4g} s ({share:.1%}), batch of {size}"
            )
    if (training := found.get("training")) is not None:
        history = training["history"]
        losses = f", loss {history[0]['loss']:.4g} -> {history[-1]['loss']:.4g}" if history else ""
        lines.append(f"  {training['steps']:,} steps{losses}")
    return [*lines, *_transferred(found.get("transfer", {}))]


def _transferred(told: dict[str, Any]) -> list[str]:
    """What teachers knew more than the student, and what became of it on rows that were held out."""
    lines = []
    for teacher in told.get("teachers", []):
        if (flips := teacher.get("flips")) is not None:
            more, less = flips["positive"], flips["negative"]
            lines.append(f"  {teacher['role']}: right where the student was wrong in {more:.1%}, wrong in {less:.1%}")
        if (after := teacher.get("transferred")) is not None:
            moved = f"{after['before']:.1%} -> {after['after']:.1%}"
            lines.append(f"  held out: {moved}, gained {after['gain']:.1%}, lost {after['loss']:.1%}")
    return lines
