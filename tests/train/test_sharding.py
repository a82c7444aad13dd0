"""Weights divided among two processes: the same losses and weights as one process with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import regraft
from launch_sharded import main
from models import model
from regraft.errors import UserError
from regraft.objectives.own_loss import OwnLoss
from regraft.objectives.perturbation import Perturbation
from regraft.resize.factorise import factorise
from regraft.train.loop import train
from regraft.train.objective import Sum
from regraft.train.options import TrainOptions
from regraft.train.teacher import Teacher
from tiny import pictures, save_tiny, write_rows

HERE = Path(__file__).parent


def launched(*arguments: str, script: str = "launch_sharded.py") -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line += [str(HERE.parent / script), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


def test_divided_weights_learn_what_whole_ones_do(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "vit", "vit", scale=3)
    data = write_rows(tmp_path / "data.jsonl", pictures(24))
    for name in ("one", "two", "killed"):
        (tmp_path / name).mkdir()
    main(folder, data, tmp_path / "one", 6)
    done = launched(str(folder), str(data), str(tmp_path / "two"), "3")
    assert done.returncode == 0, done.stderr[-3000:]
    broken = launched(str(folder), str(data), str(tmp_path / "killed"), "3", "3")
    assert broken.returncode != 0
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-2").is_dir()
    # A checkpoint holds the whole model, whatever it was divided into.
    kept = regraft.load(tmp_path / "killed" / "checkpoints" / "checkpoint-2")
    assert all(torch.isfinite(p).all() for p in kept.parameters())
    again = launched(str(folder), str(data), str(tmp_path / "killed"), "3")
    assert again.returncode == 0, again.stderr[-3000:]
    facts = [json.loads((tmp_path / name / "facts.json").read_text()) for name in ("one", "two", "killed")]
    assert [f["resumed"] for f in facts] == [0, 0, 2]
    for part in ("loss", "own", "features", "relations", "grad_norm"):
        one, two, three = ([h[part] for h in f["history"]] for f in facts)
        assert two == pytest.approx(one, rel=1e-4), part
        assert three == pytest.approx(two, rel=1e-6), part
    states = [regraft.load(tmp_path / name / "model").state_dict() for name in ("one", "two", "killed")]
    for name, value in states[1].items():
        assert torch.equal(value, states[2][name]), name
        assert torch.allclose(value, states[0][name], atol=1e-5), name


def test_what_is_divided_is_refused_where_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(whole: Any, **options: Any) -> None:
        objective = Sum(lambda examples, seeds: {}, [(1.0, OwnLoss())])
        train(whole, objective, [{"n": 0}], TrainOptions(max_steps=1, **options), folder=tmp_path, device="cpu")

    with pytest.raises(UserError, match="fsdp divides the weights among processes, and there is one"):
        go(model("bert"), fsdp=True)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        wrapped = peft.get_peft_model(model("bert"), peft.LoraConfig(target_modules=["query"]))
        with pytest.raises(UserError, match="an adapter with weights that are divided"):
            go(wrapped, fsdp=True)
        low = model("bert")
        factorise(low)
        near = Sum(lambda examples, seeds: {}, [(1.0, Perturbation())], Teacher(model("bert")))
        with pytest.raises(UserError, match="an objective that computes with weights, which are divided"):
            train(low, near, [{"n": 0}], TrainOptions(max_steps=1, fsdp=True), folder=tmp_path, device="cpu")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="weights that accelerate is to divide"):
        go(model("bert"))
