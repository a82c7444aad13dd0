"""`regraft merge` of bare state dicts, with mergekit-pytorch's switches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models import save_fine_tune, save_model

LINEAR = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.pt}]\nparameters: {weight: 0.5}\n"


def files(folder: Path) -> Path:
    """Two state dicts with four names in common and seven in all."""
    common = {name: torch.ones(3) for name in "abcd"}
    save_file({**common, "e": torch.ones(3), "f": torch.ones(2)}, folder / "a.safetensors")
    torch.save({**common, "g": torch.ones(3)}, folder / "b.pt")
    return folder


def test_on_the_command_line(cli: Any, tmp_path: Path) -> None:
    folder = files(tmp_path)
    (folder / "m.yaml").write_text(LINEAR)
    assert cli("merge", folder / "m.yaml", tmp_path / "out").exit_code == 2
    done = cli("merge", folder / "m.yaml", tmp_path / "out", "-i")
    assert done.exit_code == 0, done.output
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 4
    done = cli("merge", folder / "m.yaml", tmp_path / "all", "--tensor-union", "--json")
    assert json.loads(done.stdout)["output"]["tensors"] == 7
    assert cli("plan", folder / "m.yaml", "--tensors", "common").exit_code == 0
    assert "none of same, common, any" in cli("plan", folder / "m.yaml", "--tensors", "all").stderr.replace("\n", " ")
    wrong = cli("merge", folder / "m.yaml", tmp_path / "wrong.safetensors", "-u")
    assert "RG405" in wrong.stderr
    assert "wrong" in wrong.stderr
    both = cli("merge", folder / "m.yaml", tmp_path / "both", "-i", "-u")
    assert "say two things" in both.stderr


def test_one_file_with_its_configuration_is_a_model_if_asked_for(cli: Any, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "gpt2")
    save_fine_tune(tmp_path / "a", base, 1)
    named = [f"{{model: ./{name}/model.safetensors}}" for name in ("base", "a")]
    text = f"merge_method: linear\nmodels: [{', '.join(named)}]\nparameters: {{weight: 0.5}}\n"
    (tmp_path / "m.yaml").write_text(text)
    assert cli("merge", tmp_path / "m.yaml", tmp_path / "bare").exit_code == 0
    assert cli("merge", tmp_path / "m.yaml", tmp_path / "model", "--output", "model").exit_code == 0
    assert not (tmp_path / "bare" / "config.json").exists()
    assert (tmp_path / "model" / "config.json").exists()
