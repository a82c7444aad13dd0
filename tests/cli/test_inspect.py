"""`regraft inspect`: facts of one model, comparison of several, changes to a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models import save_model
from regraft.cli.delta_tables import number, share, short_names
from regraft.cli.facts_table import listed


def test_the_facts_of_one_model(cli, family: Path) -> None:
    shown = cli("inspect", family / "base")
    assert shown.exit_code == 0, shown.stderr
    assert "LlamaForCausalLM (llama)" in shown.stdout
    assert "2, width 32, 4 heads of 8 (2 for keys and values), feed-forward 64" in shown.stdout
    assert "rotary" in shown.stdout
    assert "F32" in shown.stdout
    assert "digest" not in shown.stdout  # weights are not read unless asked


def test_facts_as_json(cli, family: Path) -> None:
    found = json.loads(cli("inspect", family / "base", "--json").stdout)
    assert list(found) == ["models"]
    assert found["models"][0]["size"]["tensors"] == 21
    assert found["models"][0]["scan"] is None


def test_stats_find_what_is_broken(cli, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = save_model(tmp_path / "broken", "llama") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 32)
    save_file(tensors, weights, metadata={"format": "pt"})
    shown = cli("inspect", tmp_path / "broken", "--stats")
    assert shown.exit_code == 0
    assert "1 NaN and 0 infinite values in model.norm.weight (1)" in shown.stdout
    assert "model.layers.1.mlp.up_proj.weight" in shown.stdout


def test_a_folder_without_usable_weights_still_has_facts(cli, family: Path, tmp_path: Path) -> None:
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "config.json").write_bytes((family / "base" / "config.json").read_bytes())
    stub = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "stub" / "model.safetensors").write_text(stub)
    shown = cli("inspect", tmp_path / "stub")
    assert shown.exit_code == 0
    assert "LlamaForCausalLM" in shown.stdout
    assert "the weights cannot be used: this is a git-LFS pointer" in shown.stdout


def test_several_models_are_compared(cli, family: Path) -> None:
    shown = cli("inspect", family / "a", family / "b")
    assert shown.exit_code == 0, shown.stderr
    header = next(line for line in shown.stdout.splitlines() if line.strip())
    assert header.split() == ["a", "b"]
    found = json.loads(cli("inspect", family / "a", family / "b", "--json").stdout)
    assert [m["ref"] for m in found["models"]] == [str(family / "a"), str(family / "b")]
    assert "comparison" in found


def test_with_a_base_the_changes_are_measured(cli, family: Path) -> None:
    shown = cli("inspect", family / "a", family / "b", "--base", family / "base")
    assert shown.exit_code == 0, shown.stderr
    assert f"Changes to {family / 'base'}" in shown.stdout
    assert "as near as a fine-tune" in shown.stdout
    assert "sign conflicts" in shown.stdout
    found = json.loads(cli("inspect", family / "a", "--base", family / "base", "--json").stdout)
    assert found["deltas"]["base_check"][0]["verdict"] == "fine-tune"
    assert len(found["deltas"]["layers"][""]) == 2


def test_a_model_that_is_not_there(cli, tmp_path: Path) -> None:
    done = cli("inspect", tmp_path / "nothing")
    assert done.exit_code == 2
    assert done.stderr.startswith("RG101: ")


@pytest.mark.parametrize(
    ("references", "names"),
    [(["./a", "org/b"], ["a", "b"]), (["x/a", "y/a"], ["x/a", "y/a"]), (["/a/b/"], ["b"])],
)
def test_short_names_are_distinct(references: list[str], names: list[str]) -> None:
    assert short_names(references) == names


def test_cells() -> None:
    assert (number(None), number(0.123456), share(0.5), share(None)) == ("?", "0.123", "50.0%", "?")
    assert listed([]) is None
    assert listed("abc", most=2) == "a, b and 1 more"


def test_the_comparison_says_what_stands_in_the_way(cli, family: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "deep", "llama", num_hidden_layers=3)
    shown = cli("inspect", family / "a", tmp_path / "deep")
    assert shown.exit_code == 0, shown.stderr
    assert "num_hidden_layers: 2 and 3" in shown.stdout
    assert "only in deep: model.layers.2." in shown.stdout
    verdicts = {line.split()[0]: line for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert "no" in verdicts["linear"].split()
    assert "(RG203)" in verdicts["linear"]
