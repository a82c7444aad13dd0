"""The benchmarks of training and of low-rank models, in seconds: what they write is what the documentation shows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def tables() -> Any:
    spec = importlib.util.spec_from_file_location("training_tables", FOLDER / "training_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments, "--out", str(out)],
        capture_output=True, text=True, timeout=240, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert not {str(out.parent), str(Path.home())} & set(out.read_text(encoding="utf-8").split('"'))
    return results


def test_the_latency_of_low_rank_models(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    results = run("low_rank_latency.py", out, "--width", "128", "--layers", "2", "--rounds", "1", "--threads", "1")
    assert [(row["model"][:3], row["batch"]) for row in results["rows"]] == [
        ("ViT", 1), ("ViT", 32), ("BER", 1), ("BER", 32),
    ]  # fmt: skip
    for row in results["rows"]:
        assert row["parameters"][1] < row["parameters"][0]
        assert row["flops"][1] < row["flops"][0]
        assert row["wall_share"] == pytest.approx(row["wall"][1][0] / row["wall"][0][0])
    page = tables().latency(out)
    assert page.count("\n| ViT, width 128, 2 layers |") == 2
    worst = max(row["wall_share"] for row in results["rows"])
    assert f"the largest share here is {100 * worst:.0f} %" in page
    assert "1 thread;" in page


def test_the_cost_of_the_loop(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    results = run("train_overhead.py", out, "--steps", "2", "--rounds", "2", "--width", "64", "--layers", "1")
    (row,) = results["rows"]
    assert len(row["processor"]) == len(row["clock"]) == 2
    assert all(ratio > 0.2 for ratio in row["clock"])
    page = tables().overhead(out)
    assert "BERT, width 64, 1 layers" in page
    assert f"{sum(row['clock']) / 2:.3f}" in page


def test_pages_say_where_nothing_was_measured(tmp_path: Path) -> None:
    for table in (tables().latency, tables().overhead, tables().minilm):
        assert table(tmp_path / "nothing.json").startswith("No results")


def test_figures_of_minilm_are_shown_as_they_were_measured(tmp_path: Path) -> None:
    cost = {
        "parameters": {"before": 22_713_216, "after": 17_400_000}, "flops": {"before": 200, "after": 104},
        "batch": 16, "seconds": {"1": {"before": 2.0, "after": 1.5}, "16": {"before": 8.0, "after": 5.0}},
    }  # fmt: skip
    models = {
        name: {"value": 0.7 + i / 100, "interval": [0.6, 0.8], "n": 9, "unit": unit}
        for i, (name, unit) in enumerate(
            {"minilm": "pairs", "factors": "pairs", "small": "pairs", "original_tuned": "rows", "tuned": "rows"}.items()
        )
    }
    models["small"]["cost"] = models["factors"]["cost"] = cost
    facts = {
        "date": "2026-01-01",
        "seconds": 9.0,
        "load": [0.1, 1.2],
        "cpu": "",
        "cores": 2,
        "threads": 2,
        "torch": "2",
    }
    path = tmp_path / "minilm.json"
    path.write_text(json.dumps({"models": models, **facts}), encoding="utf-8")
    page = tables().minilm(path)
    assert "| `pela` | 0.720 (0.600–0.800) | – | 17.4 M | 52 % | 62 % | 75 % |" in page
    assert "| `pela`, fine-tuned | – | 0.740 (0.600–0.800) | 17.4 M | 52 % | 62 % | 75 % |" in page
    assert "| MiniLM, fine-tuned | – | 0.730 (0.600–0.800) | 22.7 M | 100 % | 100 % | 100 % |" in page
