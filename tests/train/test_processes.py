"""Two processes see what one with the doubled batch sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from described import described
from launch import main
from regraft.recipe import load_recipe
from regraft.recipe.run import run
from regraft.recipe.settings import Settings
from regraft.train import processes
from tiny import pictures, save_tiny, write_rows

HERE = Path(__file__).parent


@pytest.mark.parametrize("rows", [pictures, described])
def test_two_processes_are_one_with_the_doubled_batch(rows: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "vit", "vit")
    data = write_rows(tmp_path / "data.jsonl", rows(24))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    main(folder, data, tmp_path / "one", 6)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(HERE.parent / "launch.py"), str(folder), str(data), str(tmp_path / "two"), "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (regraft.load(tmp_path / name / "model").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6), name


RECIPE = """
models: {base: ./vit, other: ./other}
steps:
  merged: {merge: linear, models: [base, other]}
  tuned: {train: fine_tune, model: merged, data: data.jsonl, max_steps: 4, per_device_train_batch_size: BATCH,
          logging_steps: 1, learning_rate: 0.001, adam_epsilon: 0.0001}
  score: {evaluate: accuracy, models: [merged, tuned], data: data.jsonl}
  small: {compress: svd, model: tuned, ratio: 2}
"""


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`regraft` in two processes."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "regraft"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*line, *arguments], cwd=folder, capture_output=True, text=True, env=environment, check=False)


def test_a_recipe_in_two_processes_is_one_with_the_doubled_batch(tmp_path: Path) -> None:
    save_tiny(tmp_path / "vit", "vit")
    save_tiny(tmp_path / "other", "vit", seed=1)
    write_rows(tmp_path / "data.jsonl", pictures(24))
    for name, batch in (("one", "6"), ("two", "3")):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.replace("BATCH", batch), encoding="utf-8")
    run(load_recipe(tmp_path / "one.yaml"), tmp_path / "one", Settings(device="cpu"))
    done = launched(tmp_path, "run", "two.yaml", "-o", "two", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("score (accuracy)") == 1  # one process speaks
    one, two = (regraft.load(tmp_path / name / "tuned").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6), name
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two")]
    assert [s["score"]["value"] for s in scores[0]] == [s["score"]["value"] for s in scores[1]]
    histories = [
        json.loads((tmp_path / name / "tuned" / "regraft.json").read_text())["diagnostics"]["training"]["history"]
        for name in ("one", "two")
    ]
    assert [h["loss"] for h in histories[0]] == pytest.approx([h["loss"] for h in histories[1]], rel=1e-5)
    again = launched(tmp_path, "run", "two.yaml", "-o", "two", "--device", "cpu")
    assert again.returncode == 0, again.stderr[-3000:]
    line = ["train", "fine_tune", "vit", "new", "--data", "data.jsonl", "--set", "max_steps=2", "--device", "cpu"]
    alone = launched(tmp_path, *line)
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert alone.stdout.count("2 steps") == 1
    assert regraft.load(tmp_path / "new") is not None


def test_one_process_is_a_team_that_need_not_meet() -> None:
    alone = processes.team()
    assert alone.first
    alone.meet()
    assert alone.agreed(True)
    assert not alone.agreed(False)
    assert alone.any(True)
    assert not alone.any(False)


STAGES = """
models: {student: ./student, teacher: ./teacher}
steps:
  small: {train: ssld, model: student, teacher: teacher, data: data.jsonl, unlabelled: pool.jsonl, max_steps: 12,
          per_device_train_batch_size: BATCH, logging_steps: 1, learning_rate: 0.001, adam_epsilon: 0.0001}
"""


def test_stages_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """What is chosen, and what a stage leaves for the next, are written by one process and read by both."""
    save_tiny(tmp_path / "student", "vit")
    save_tiny(tmp_path / "teacher", "vit", seed=1)
    rows = pictures(48)
    write_rows(tmp_path / "data.jsonl", rows[:24])
    write_rows(tmp_path / "pool.jsonl", rows[24:])
    for name, batch in (("one", "6"), ("two", "3")):
        (tmp_path / f"{name}.yaml").write_text(STAGES.replace("BATCH", batch), encoding="utf-8")
    run(load_recipe(tmp_path / "one.yaml"), tmp_path / "one", Settings(device="cpu"))
    done = launched(tmp_path, "run", "two.yaml", "-o", "two", "--device", "cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (regraft.load(tmp_path / name / "small").state_dict() for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6), name
    stages = [
        json.loads((tmp_path / name / "small" / "regraft.json").read_text())["diagnostics"]["training"]["stages"]
        for name in ("one", "two")
    ]
    assert [[s["name"], s["steps"]] for s in stages[0]] == [[s["name"], s["steps"]] for s in stages[1]]
