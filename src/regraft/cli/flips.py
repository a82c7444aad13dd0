"""`regraft flips`: what other classifiers know that one does not, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli import options as opt
from regraft.cli.terminal import Terminal
from regraft.errors import UserError

Student = Annotated[str, typer.Argument(metavar="STUDENT", help="The classifier that would learn: a folder or Hub id.")]
Teachers = Annotated[list[str], typer.Argument(metavar="TEACHER", help="Classifiers that would teach it.")]
Data = Annotated[Path, typer.Option("--data", metavar="PATH", help="A data file or folder with labels.")]
Assignments = Annotated[
    list[str],
    typer.Option("--set", metavar="OPTION=VALUE", help="What the data's columns are called: --set label=digit."),
]
MOST = 20  # classes that are shown


def flips(
    terminal: Terminal,
    student: Student,
    teachers: Teachers,
    data: Data,
    assignments: Assignments = [],  # noqa: B006 - typer copies it
    device: opt.Device = "auto",
    as_json: opt.Json = False,
    offline: opt.Offline = False,
) -> None:
    """Measure what other classifiers know that one does not: where it is wrong and they are right, by class. Nothing
    is trained; `regraft train transfer` takes over what is there."""
    import yaml

    from regraft.checkpoint import open_checkpoint
    from regraft.train.complement import FlipOptions, complement

    chosen: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError("RG302", f"--set {assignment} gives no value", fix="write --set label=digit")
        chosen[name] = yaml.safe_load(value)
    from regraft.methods import validated

    options = validated("flips", FlipOptions, chosen)
    folders = {ref: open_checkpoint(ref, offline=offline).path for ref in [student, *teachers]}
    found = complement(folders[student], {ref: folders[ref] for ref in teachers}, data, options, device=device)
    if as_json:
        terminal.json({"student": student, "teachers": {ref: one.to_dict() for ref, one in found.items()}})
        return
    _show(terminal, found)


def _show(terminal: Terminal, found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    first = next(iter(found.values())).flips
    terminal.out.print(f"student: right in {first.student:.2%} of {first.n:,} rows", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    counted = ("positive flips", "negative flips", "ceiling", "entropy", "half in", "surer of label", "surer")
    for head in ("teacher", "right", *counted):
        table.add_column(head, justify="left" if head == "teacher" else "right")
    for ref, one in found.items():
        f = one.flips
        spread = "" if f.positive_entropy is None else f"{f.positive_entropy:.2f}"
        half = f"{f.classes_holding['50%']} of {len(f.positive_per_class)}" if f.classes_holding else ""
        shares = [f"{share:.2%}" for share in (f.teacher, f.positive, f.negative, f.ceiling)]
        table.add_row(Text(ref), *shares, spread, half, f"{one.surer_of_label:.1%}", f"{one.surer:.1%}")
    terminal.out.print(table)
    for ref, one in found.items():
        ranked = sorted(one.flips.positive_per_class.items(), key=lambda item: -item[1])
        shown = [(name, up) for name, up in ranked if up][:MOST]
        if not shown:
            terminal.note(f"{ref} is right nowhere where the student is wrong: there is nothing to take over")
            continue
        parts = [f"{name} {up} (-{one.flips.negative_per_class[name]})" for name, up in shown]
        more = sum(1 for _, up in ranked if up) - len(shown)
        ending = f", and {more} more" if more else ""
        terminal.out.print(f"{ref}: flips by class {', '.join(parts)}{ending}", markup=False)
