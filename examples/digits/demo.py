"""The main job on real data: train a small base and four experts, merge them by a recipe, see what it is worth.

    python examples/digits/demo.py --out demo

leaves ordinary checkpoints in demo/models, data in demo/data, the recipe beside them, every merge in demo/merges, and
demo/report.html. All numbers come from this run. Options of the rules are chosen on validation images; the table
shows test images, which nothing was chosen on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TextTable
from skills import BASE, EXPERTS, SKILLS, Split, load_splits, write_data
from training import SCALES, Scale, train_base, train_expert

from regraft.errors import UserError
from regraft.recipe.load import load_recipe
from regraft.recipe.run import Evaluation, RunResult, run
from regraft.report.charts import thumbnails
from regraft.report.page import write_page
from regraft.report.run import run_sections
from regraft.report.scores import sweep_figures
from regraft.report.sections import Column, Figure, Section, Table

CONSOLE = Console()
RECIPE = Path(__file__).with_name("recipe.yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is made")
    parser.add_argument("--scale", choices=SCALES, default="full", help="smoke: seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # matrices of this size are no faster on more threads, and much slower on a busy machine
    transformers.utils.logging.disable_progress_bar()
    try:
        demo(options.out, SCALES[options.scale], options.seed)
    except UserError as error:
        CONSOLE.print(f"{error.code}: {error}", markup=False)
        return 2
    return 0


def demo(out: Path, scale: Scale, seed: int) -> None:
    started = time.monotonic()
    splits = load_splits(seed, scale.images)
    for name in ("validation", "test"):
        write_data(out / "data" / f"{name}.jsonl", splits[name])
    make_models(out / "models", splits["train"], scale, seed)
    trained = time.monotonic()
    recipe = Path(shutil.copy(RECIPE, out / "recipe.yaml"))
    result = run(load_recipe(recipe), out / "merges", progress=Steps())
    chosen = choose(result)
    tested = [e for e in result.evaluations if e.step == "test"]
    shown = [e for e in tested if e.model in chosen or e.model not in result.artefacts]
    print_table(shown, chosen)
    findings = summarise(shown, result)
    facts = {
        "training": f"{trained - started:.0f} s",
        "merging and scoring": f"{time.monotonic() - trained:.0f} s",
        "test images per skill": str(len(splits["test"].labels)),
        "parameters per model": f"{parameters(result):,}",
    }
    page = write_page(
        out / "report.html",
        title="Four experts on handwritten digits, merged",
        sections=[
            skills_figure(splits["test"]),
            *run_sections(shown, result.artefacts, show=names(shown)),
            *sweeps(result),
        ],
        summary=findings,
        facts=facts,
    )
    CONSOLE.print("\n".join(findings), markup=False, highlight=False)
    CONSOLE.print(f"{time.monotonic() - started:.0f} s in all. The whole story: {page}", markup=False, highlight=False)


def make_models(folder: Path, data: Split, scale: Scale, seed: int) -> None:
    """The base and one expert per skill, as ordinary checkpoints."""
    timed("base", lambda: train_base(folder / "base", data, scale, seed))
    for number, skill in enumerate(EXPERTS, 1):
        target = folder / skill.__name__
        timed(skill.__name__, lambda: train_expert(target, folder / "base", data, skill, scale, seed + number))  # noqa: B023


def timed(name: str, work: Callable[[], None]) -> None:
    started = time.monotonic()
    work()
    CONSOLE.print(f"trained {name}: {time.monotonic() - started:.1f} s", highlight=False)


class Steps:
    """One line per step of the recipe."""

    def step(self, name: str) -> None:
        CONSOLE.print(f"step {name}", highlight=False, markup=False)

    def advance(self, done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        CONSOLE.print(f"  {text}", highlight=False, markup=False)


def choose(result: RunResult) -> dict[str, str]:
    """The member of each sweep that is best on validation images -> the rule's name."""
    best: dict[str, Evaluation] = {}
    for one in result.evaluations:
        rule = one.model.split("@")[0]
        if one.step == "choose" and (rule not in best or value(one) > value(best[rule])):
            best[rule] = one
    return {one.model: rule for rule, one in best.items()}


def value(one: Evaluation) -> float:
    return float(one.score["value"])


def names(evaluations: Sequence[Evaluation]) -> list[str]:
    return [e.model for e in evaluations]


def parameters(result: RunResult) -> int:
    return sum(job.info.numel for job in result.plan.merges[0].jobs)


def print_table(shown: Sequence[Evaluation], chosen: Mapping[str, str]) -> None:
    table = TextTable(
        "model", "mean", *SKILLS, title="Right answers on test images, %", box=SIMPLE_HEAD, pad_edge=False
    )
    table.padding, table.pad_edge, table.columns[0].no_wrap = (0, 0), False, True  # fits 80 columns
    for column in table.columns[1:]:
        column.justify = "right"
    for one in shown:
        groups = [one.score["per_group"][skill]["value"] for skill in SKILLS]
        style = "bold" if value(one) == max(map(value, shown)) else None
        section = one.model in ("base", EXPERTS[-1].__name__)
        table.add_row(one.model, *(f"{100 * v:.1f}" for v in (value(one), *groups)), style=style, end_section=section)
    CONSOLE.print(table)


def summarise(shown: Sequence[Evaluation], result: RunResult) -> list[str]:
    """What was found, in sentences; every number is measured."""
    singles = [e for e in shown if e.model not in result.artefacts]
    merges = [e for e in shown if e.model in result.artefacts]
    base = next(e for e in shown if e.model == "base")
    single, merged = max(singles, key=value), max(merges, key=value)
    more = sum(value(e) > value(single) for e in merges)
    return [
        f"The base reads {percent(base.score['per_group'][BASE.__name__]['value'])} of upright digits and "
        f"{percent(value(base))} over all {len(SKILLS)} skills; the best single model, {single.model}, reads "
        f"{percent(value(single))}.",
        f"The best merge, {merged.model}, reads {percent(value(merged))} with the same size and no further training; "
        f"{more} of {len(merges)} rules beat every single model.",
    ]


def percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def skills_figure(test: Split) -> Section:
    """One test image as the base knows it, and as the experts learn to read it."""
    image = test.images[:1]
    pictures = {name: change(image)[0, 0].tolist() for name, change in SKILLS.items()}
    caption = "The base is trained on upright digits only; each expert fine-tunes it on one other skill."
    return Figure("The skills", thumbnails(pictures, title="A digit in every variant"), caption)


def sweeps(result: RunResult) -> list[Section]:
    """Every member of every sweep on validation images: what the choice was made on."""
    columns = [Column("model"), Column("accuracy % (validation)", better="high", percent=True)]
    found = [e for e in result.evaluations if e.step == "choose"]
    caption = "The best member of each sweep is the one whose test result is shown above."
    rules = [e.model.split("@")[0] for e in found]
    table = Table("How options were chosen", columns, [[e.model, value(e)] for e in found], caption, rules)
    return [*sweep_figures(found), table]


if __name__ == "__main__":
    sys.exit(main())
