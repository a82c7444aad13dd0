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
from regraft.errors import UserError
from regraft.recipe import parse_recipe
from regraft.recipe.plan import make_plan
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
        assert torch.allclose(value, two[name], atol=1e-5), name


def test_recipes_that_train_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "vit", "vit")
    write_rows(tmp_path / "data.jsonl", pictures(4))
    text = "models: {base: ./vit}\nsteps: {a: {train: fine_tune, model: base, data: data.jsonl}}\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several processes"):
        make_plan(parse_recipe(text, path=tmp_path / "recipe.yaml"))
