"""`regraft extract-lora`: what it prints, for people and for scripts, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_an_adapter_and_what_it_keeps(cli, family: Path, tmp_path: Path) -> None:
    arguments = ("extract-lora", family / "a", tmp_path / "out", "--base", family / "base", "--rank", 8, "--embeddings")
    done = cli(*arguments, "--save-modules", "all")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["changed", "tensors", "kept", "rank", "relative", "error", "energy"]
    row = next(line for line in lines if line.startswith("model.layers.*.mlp.up_proj.weight "))
    assert "low rank" in row
    assert row.split()[1] == "2"
    assert "saved" in next(line for line in lines if line.startswith("model.norm.weight"))
    assert lines[-1].startswith(f"{tmp_path / 'out'}: relative error 0.")
    assert "rank up to 8" in lines[-1]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_every_tensor_with_verbose_and_nothing_with_quiet(cli, family: Path, tmp_path: Path) -> None:
    arguments = ("extract-lora", family / "a", tmp_path / "out", "--base", family / "base", "--exclude", "norm|embed")
    assert "model.layers.1.mlp.up_proj.weight" in cli(*arguments, "-v").stdout
    quiet = cli(*arguments, "--force", "-q")
    assert (quiet.exit_code, quiet.stdout) == (0, "")


def test_figures_as_json(cli, family: Path, tmp_path: Path) -> None:
    arguments = ("extract-lora", family / "a", tmp_path / "out", "--base", family / "base", "--exclude", "norm|embed")
    found = json.loads(cli(*arguments, "--energy", 0.9, "--max-rank", 20, "--dtype", "float16", "--json").stdout)
    assert found["out"] == str(tmp_path / "out")
    assert found["largest_rank"] <= 20
    assert found["output"]["dtype"] == "float16"
    assert found["energy"] == pytest.approx(1 - found["relative_error"] ** 2)
    kinds = {one["kind"] for one in found["tensors"]}
    assert kinds == {"low rank", "left out"}
    assert set(found["tensors"][0]) == {"name", "kind", "rank", "norm", "error", "energy"}


def test_what_is_wrong_ends_with_a_sentence(cli, family: Path, tmp_path: Path) -> None:
    arguments = ("extract-lora", family / "a", tmp_path / "out", "--base", family / "base")
    done = cli(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("RG309: model.embed_tokens.weight")
    assert cli(*arguments, "--rank", 0).stderr.startswith("RG303: rank is 0")
    assert cli(*arguments, "--dtype", "int8").stderr.startswith("RG303: 'int8' is no dtype for factors")
    assert cli(*arguments[:3]).exit_code == 2  # --base is missing
    assert not (tmp_path / "out").exists()


def test_adapters_merge_into_an_adapter(cli, family: Path, tmp_path: Path) -> None:
    for name in "ab":
        made = cli("extract-lora", family / name, tmp_path / name, "--base", family / "base", "--exclude", "norm|embed")
        assert made.exit_code == 0, made.stderr
    recipe = tmp_path / "recipe.yaml"
    models = ", ".join(f"{name}: {family}/base+{tmp_path}/{name}" for name in "ab")
    recipe.write_text(f"models: {{{models}}}\nsteps: {{both: {{merge: linear, models: [a, b]}}}}\n")
    arguments = ("merge", recipe, tmp_path / "out", "--output", "lora", "--rank", 8)
    done = cli(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "rank up to 8" in done.stdout.splitlines()[-1]
    assert "both: cut off, relative error 0." in done.stderr
    again = cli(*arguments, "--json")
    assert f"{tmp_path / 'out'} is up to date" in again.stderr
    assert json.loads(again.stdout)["adapter"]["largest_rank"] == 8
    assert cli("merge", recipe, tmp_path / "x", "--rank", 8).stderr.startswith("RG303: --rank and --energy are for")
