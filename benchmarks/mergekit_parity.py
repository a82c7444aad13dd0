"""Does a mergekit recipe give the same model here? Rules x families x dtypes x arithmetic x ways of writing parameters.

    python benchmarks/mergekit_parity.py --mergekit VENV/bin/python --out benchmarks/results/parity.json

makes tiny models of every family with transformers, merges them by one recipe per cell with both tools, and compares
all entries in units of the last place. Rules that draw are compared in distribution (`parity_random`). `VENV` is an
environment of mergekit's own.

Arithmetic in float64 shows whether both compute the same function: what is left then is one rounding. In float32 the
results also hold the rounding errors of each tool; how far each is from mergekit's float64 tells whose they are.
Entries that tie at a threshold, and those that follow from a tie, are counted apart.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import parity_random
import parity_table
import torch
import transformers
import yaml
from machine import describe
from parity_entries import THRESHOLDS, at_threshold, distance, follows, scores
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor

from regraft.errors import UserError
from regraft.methods import methods
from regraft.recipe import load_recipe
from regraft.recipe.run import merge
from regraft.recipe.settings import Settings

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import models as tiny

FAMILIES = ("llama", "qwen2", "mistral", "gpt2", "bert", "roberta", "t5", "vit")
SLICED = ("llama", "qwen2", "mistral", "gpt2")  # mergekit stacks layers of what its tables know
MODULES = {"t5": ("encoder", "decoder", "shared")}
# What mergekit's tables describe: heads, poolers, gated units.
KINDS = {
    "bert": (transformers.BertForSequenceClassification, {}),
    "roberta": (transformers.RobertaForSequenceClassification, {}),
    "t5": (transformers.T5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu"}),
}
LAYERS = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = (0.6, 0.3)
ARITHMETIC = ("float64", "float32")


@dataclass(frozen=True)
class Case:
    """How a rule is used: options for all, options of each model, and which models it takes."""

    values: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    models: Sequence[str] = ("a", "b")
    base: str | None = "base"
    varied: str = "weight"  # the option that filters and gradients vary


_EACH = {"weight": WEIGHTS}
CASES = {
    "linear": Case(each=_EACH, base=None),
    "slerp": Case({"t": 0.3}, models=("base", "a"), varied="t"),
    "task_arithmetic": Case({"lambda": 0.9}, _EACH),
    "ties": Case({"lambda": 0.9}, {**_EACH, "density": (0.5, 0.7)}),
    "breadcrumbs": Case({}, {**_EACH, "density": (0.7, 0.6), "gamma": (0.02, 0.05)}),
    "breadcrumbs_ties": Case({}, {**_EACH, "density": (0.7, 0.6), "gamma": (0.02, 0.05)}),
    "sce": Case({"select_topk": 0.5}, varied="select_topk"),
    "model_stock": Case(varied=""),
    "nearswap": Case({"t": 0.002}, models=("a",), varied="t"),
    "nuslerp": Case(each=_EACH, base=None),
    "multislerp": Case(each=_EACH, base=None),
    "karcher": Case(base=None, varied=""),
    "ram": Case(varied=""),
    "ramplus_tl": Case({"r": 0.1, "alpha": 0.2}, varied=""),
    "arcee_fusion": Case(models=("a",), varied=""),
    "passthrough": Case(models=("a",), base=None, varied="scale"),
}
VARIANTS = ("plain", "filters", "gradient", "slices", "modules", "state-dict")
RUNS = ((0, 3), (2, LAYERS))  # what the slices hold, of which the second begins at the result's layer 3

# Runs in mergekit's environment: one process for all cells, since it takes seconds to start.
DRIVER = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
import yaml
for line in sys.stdin:
    job = json.loads(line)
    try:
        written = yaml.safe_load(open(job["recipe"]))
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, random_seed=1)
        if job["recipe"].endswith(".state-dict.yaml"):
            config = RawPyTorchMergeConfig.model_validate(written)
            Executor(plan_flat_merge(config, job["out"], False, False, options)).execute()
        else:
            run_merge(MergeConfiguration.model_validate(written), job["out"], options=options)
        said = ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200] or "failed"
    print("told " + json.dumps(said), flush=True)
"""


@dataclass
class Cell:
    """One comparison.

    `dtype` is that of inputs and result. `tied` counts entries that share the score of a threshold, of which mergekit
    keeps some and regraft all. `moved` counts those that are apart because `sce` weighs models by what it keeps, and in
    which each tool's result is that of the rule for what this tool has kept. Of the others `worst` is the largest
    difference in units of the last place, and `apart` counts those beyond one unit. In float32 arithmetic `off` and
    `peer_off` are how far regraft's and mergekit's entries are from what mergekit computes in float64, at most; entries
    that tie, or follow from a tie, are left out.
    """

    rule: str
    family: str
    dtype: str
    variant: str
    arithmetic: str
    entries: int = 0
    worst: float = 0.0
    apart: int = 0
    tied: int = 0
    moved: int = 0
    off: float | None = None
    peer_off: float | None = None
    refused: str = ""

    @property
    def same(self) -> bool:
        return not self.apart and not self.refused

    @property
    def file(self) -> str:
        return f"{self.rule}-{self.variant}-{self.arithmetic}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mergekit", type=Path, required=True, metavar="PYTHON", help="of mergekit's environment")
    parser.add_argument("--rules", default=",".join((*CASES, *parity_random.RULES)))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    given = parser.parse_args(arguments)
    registered = {method.name for method in methods("merge")}
    wanted = [rule for rule in given.rules.split(",") if rule in registered]
    rules = [rule for rule in wanted if rule in CASES]
    with tempfile.TemporaryDirectory(prefix="mergekit-parity-") as folder:
        python = given.mergekit.absolute()
        cells = list(compare(Path(folder), python, rules, given.families.split(",")))
        drawn = [rule for rule in wanted if rule in parity_random.RULES]
        rows = list(compare_draws(Path(folder), python, drawn)) if drawn else []
        results = {
            "schema": 1,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "machine": describe(Path(folder), python),
            "cells": [asdict(cell) for cell in cells],
            "random": rows,
        }
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console().print(parity_table.markdown(results), markup=False)
    unlike = [row for row in rows if row["refused"] or parity_table.furthest(row) > parity_table.LIMIT]
    return 0 if not unlike and all(cell.same for cell in cells) else 1


def compare(folder: Path, python: Path, rules: Sequence[str], families: Sequence[str]) -> Iterator[Cell]:
    """All cells, in order."""
    for family in families if rules else ():
        for dtype in DTYPES:
            make_models(folder / family / dtype, family, DTYPES[dtype])
    cells = [
        cell
        for rule in rules
        for family in families
        for dtype in DTYPES
        for variant in VARIANTS
        for arithmetic in ARITHMETIC
        if recipe(cell := Cell(rule, family, dtype, variant, arithmetic), ()) is not None
    ]
    with mergekit(python) as ask:
        for cell in track(cells, "cells", console=Console(stderr=True)):
            yield compared(cell, folder, ask)


def compare_draws(folder: Path, python: Path, rules: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of `parity_random` for some rules."""
    with mergekit(python) as ask:
        yield from parity_random.compare(folder / "draws", ask, rules)


@contextmanager
def mergekit(python: Path) -> Iterator[Callable[[Path, Path], str]]:
    """`ask(recipe, out)`: have mergekit make a model, and return what kept it from that, "" if nothing did."""
    command = [str(python), "-c", DRIVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        requests, answers = peer.stdin, peer.stdout

        def ask(recipe: Path, out: Path) -> str:
            requests.write(json.dumps({"recipe": str(recipe), "out": str(out)}) + "\n")
            requests.flush()
            told = next(line for line in answers if line.startswith("told "))
            return str(json.loads(told[5:]))

        yield ask
        requests.close()


def make_models(folder: Path, family: str, dtype: torch.dtype) -> None:
    """`base` and two fine-tunes of it."""
    layers = {"gpt2": "n_layer", "t5": "num_layers"}.get(family, "num_hidden_layers")
    kind, changes = KINDS.get(family, (tiny.CLASSES[family], {}))
    torch.manual_seed(0)
    kind(tiny.config(family, **{layers: LAYERS}, **changes)).to(dtype).save_pretrained(folder / "base")
    for seed, name in enumerate("ab", start=1):
        tiny.save_fine_tune(folder / name, folder / "base", seed, scale=0.05)


def recipe(cell: Cell, names: Sequence[str]) -> dict[str, Any] | None:
    """The recipe of a cell; None if there is none. `names` are those of the tensors, for filters."""
    case, variant = CASES[cell.rule], cell.variant
    if variant in ("filters", "gradient") and not case.varied:
        return None
    if variant == "slices" and cell.family not in SLICED:
        return None
    if variant == "modules" and cell.family not in MODULES:
        return None
    suffix = "/model.safetensors" if variant == "state-dict" else ""
    each = [{k: v[i] for k, v in case.each.items()} for i in range(len(case.models))]
    values = dict(case.values)
    if variant == "filters":
        part = chosen_part(names)
        vary(each, values, case, lambda value: [{"filter": part, "value": value / 2}, {"value": value}])
    if variant == "gradient":
        vary(each, values, case, lambda value: [value, value / 3, value / 2])
    written: dict[str, Any] = {"merge_method": cell.rule}
    if case.base is not None:
        written["base_model"] = f"./{case.base}{suffix}"
    entries = entries_of(case, each, suffix)
    if variant == "slices":
        if case.base is not None and case.base not in case.models:
            entries.append({"model": f"./{case.base}"})  # mergekit wants the base among the sources
        written["slices"] = [{"sources": [{**e, "layer_range": list(run)} for e in entries]} for run in RUNS]
    elif variant == "modules":
        written["modules"] = {name: {"models": entries} for name in MODULES[cell.family]}
        if case.varied:  # the first module is merged by settings of its own
            other, own = [dict(e) for e in each], dict(values)
            vary(other, own, case, lambda value: value / 2)
            first = {"models": entries_of(case, other, suffix), **({"parameters": own} if own != values else {})}
            written["modules"][MODULES[cell.family][0]] = first
    else:
        written["models"] = entries
    options = {"parameters": values} if values else {}
    return {**written, **options, "dtype": cell.arithmetic, "out_dtype": cell.dtype}


def entries_of(case: Case, each: Sequence[Mapping[str, Any]], suffix: str) -> list[dict[str, Any]]:
    """The list of models, with the options of each."""
    return [
        {"model": f"./{model}{suffix}", **({"parameters": dict(own)} if own else {})}
        for model, own in zip(case.models, each, strict=True)
    ]


def vary(each: list[dict[str, Any]], values: dict[str, Any], case: Case, change: Any) -> None:
    """Replace the option that the case varies, wherever it stands, by what `change` makes of it."""
    if case.varied in values:
        values[case.varied] = change(values[case.varied])
    elif case.varied in case.each:
        each[0][case.varied] = change(each[0][case.varied])
    else:
        each[0][case.varied] = change(0.8)


def chosen_part(names: Sequence[str]) -> str:
    """A part of many tensors' names, such as `self_attn`."""
    parts = [part for name in names for part in name.split(".")[:-1] if not part.isdigit()]
    inner = [part for part in dict.fromkeys(parts) if 1 < parts.count(part) < len(names) // 2]
    return max(inner, key=parts.count) if inner else "*"


def compared(cell: Cell, folder: Path, ask: Callable[[Path, Path], str]) -> Cell:
    """Both tools on one recipe."""
    here = folder / cell.family / cell.dtype
    base = load_file(here / "base" / "model.safetensors")
    path = here / f"{cell.file}.{cell.variant}.yaml"
    path.write_text(yaml.safe_dump(recipe(cell, list(base)), sort_keys=False), encoding="utf-8")
    ours, theirs = (here / f"{cell.file}-{tool}" for tool in ("regraft", "mergekit"))
    # mergekit looks paths up from where it runs.
    absolute = here / f"absolute-{path.name}"
    absolute.write_text(path.read_text(encoding="utf-8").replace("./", f"{here}/"), encoding="utf-8")
    if said := ask(absolute, theirs):
        cell.refused = f"mergekit: {said.replace(str(here), '.')}"
        return cell
    try:
        merge(load_recipe(path), ours, Settings(force=True))
    except UserError as error:
        cell.refused = f"regraft: {error.code}: {error}".replace(str(here), ".")
        return cell
    exact = here / f"{replace(cell, arithmetic='float64').file}-mergekit"  # made for the cell before
    results = [load_file(made / "model.safetensors") for made in (ours, theirs, exact)]
    measure(cell, *results, here)
    shutil.rmtree(ours)
    if cell.arithmetic != "float64":
        shutil.rmtree(theirs)
        shutil.rmtree(exact)
    return cell


def measure(
    cell: Cell, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], exact: Mapping[str, Tensor], here: Path
) -> None:
    """Fill in how far the results are apart, in units of the last place of the largest number involved in an entry."""
    models = [load_file(here / name / "model.safetensors") for name in ("base", "a", "b")]
    for name, b in theirs.items():
        if name not in ours:
            if not tied(name, b, ours):
                cell.refused = f"regraft's model lacks {name}"
            continue
        a = ours[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            cell.refused = f"{name} is {a.dtype} {tuple(a.shape)} here and {b.dtype} {tuple(b.shape)} there"
            return
        if not a.is_floating_point() or not a.numel():
            continue
        inputs = torch.stack([m[source_name(name) if cell.variant == "slices" else name].double() for m in models])
        units = distance(a, b, inputs)
        cell.entries += a.numel()
        apart = units > 1
        explained = torch.zeros_like(apart)
        if cell.rule in THRESHOLDS and bool(apart.any()):
            same_score = at_threshold(apart, scores(cell.rule, inputs.flatten(1)), THRESHOLDS[cell.rule])
            cell.tied += int(same_score.sum())
            explained |= same_score
            if cell.rule == "sce" and bool(same_score.any()):
                moved = apart & ~same_score & follows(a, b, inputs, same_score)
                cell.moved += int(moved.sum())
                explained |= moved
            apart &= ~explained
            units[explained] = 0
        cell.worst = max(cell.worst, float(units.max()))
        cell.apart += int(apart.sum())
        if cell.arithmetic != "float64":
            off, peer_off = (distance(made, exact[name], inputs)[~explained] for made in (a, b))
            cell.off = max(cell.off or 0.0, float(off.max())) if len(off) else cell.off
            cell.peer_off = max(cell.peer_off or 0.0, float(peer_off.max())) if len(peer_off) else cell.peer_off


def source_name(name: str) -> str:
    """The name in the models of what a sliced result has under this name."""
    (_, stop), (start, _) = RUNS
    return re.sub(r"\.(\d+)\.", lambda m: f".{i if (i := int(m[1])) < stop else i - stop + start}.", name, count=1)


def tied(name: str, values: Tensor, ours: Mapping[str, Tensor]) -> bool:
    """Whether what mergekit wrote twice is there under another name."""
    return any(values.shape == other.shape and torch.equal(values, other) for other in ours.values())


if __name__ == "__main__":
    sys.exit(main())
