"""`regraft merge`, `run` and `plan`: what they print, write and leave behind, and their exit status."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from regraft.checkpoint.lineage import Lineage


def test_merge_writes_a_model_that_loads(cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("merge", recipe, out, "--workers", 1)
    assert done.exit_code == 0, done.stderr
    assert f"{out}: ties, " in done.stdout
    assert "merged: done in" in done.stderr
    transformers.AutoModelForCausalLM.from_pretrained(out)
    again = cli("merge", recipe, out)
    assert again.exit_code == 0
    assert "up to date" in again.stderr


def test_merge_json_is_the_only_thing_on_stdout(cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("merge", recipe, tmp_path / "out", "--json", "--set", "steps.merged.density=0.5", "--seed", 5)
    facts = json.loads(done.stdout)
    assert facts["method"] == "ties"
    assert facts["out"] == str(tmp_path / "out")
    assert facts["output"]["bytes"] > 0
    lineage = Lineage.read(tmp_path / "out")
    assert lineage.options[0].options["density"] == [0.5, 0.5]
    assert lineage.seeds == {"merge": 5}
    assert "density: 0.5" in lineage.recipe


def test_quiet_says_nothing(cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("-q", "merge", recipe, tmp_path / "out")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_an_output_that_exists_is_kept_unless_forced(cli, recipe: Path, family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(family / "a", out)
    refused = cli("merge", recipe, out)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("RG401: ")
    assert not (out / "regraft.json").exists()
    assert cli("merge", recipe, out, "--force").exit_code == 0
    assert (out / "regraft.json").exists()


def test_not_even_force_replaces_what_is_no_model(cli, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    refused = cli("merge", recipe, tmp_path / "out", "--force")
    assert (refused.exit_code, refused.stderr[:7]) == (2, "RG401: ")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["merge", "run"])
def test_dry_run_writes_nothing(cli, recipe: Path, tmp_path: Path, command: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    done = cli(command, recipe, *([out] if command == "merge" else ["-o", out]), "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert "merged: ties of a, b on base" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_shows_the_value_per_tensor(cli, recipe: Path) -> None:
    shown = cli("plan", recipe, "--set", "steps.merged.models.a.weight=[0.2, 0.8]", "--set", "steps.merged.lambda=1.5")
    assert shown.exit_code == 0, shown.stderr
    assert "weight a=0.2 b=0.4" in shown.stdout
    assert "weight a=0.8 b=0.4" in shown.stdout
    assert "lambda 1.5" in shown.stdout
    assert " MB of memory" in shown.stdout


def test_the_plan_as_json(cli, recipe: Path) -> None:
    plan = json.loads(cli("plan", recipe, "--json", "--max-memory", "64GB").stdout)
    assert plan["steps"][0]["merge"] == "ties"
    assert plan["steps"][0]["values"][0]["options"]["weight"] == [0.6, 0.4]
    assert plan["disk_bytes"] > 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("steps.merged.merge=tie", "RG301"),
        ("steps.merged.densty=0.1", "RG302"),
        ("steps.merged.density=2", "RG303"),
        ("steps.merged.models.c={}", "RG307"),
        ("models.a=/no/such/folder", "RG101"),
    ],
)
def test_a_recipe_that_cannot_run_fails_before_anything_is_written(
    cli, recipe: Path, tmp_path: Path, change: str, code: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["plan", recipe], ["merge", recipe, tmp_path / "out"], ["run", recipe, "-o", tmp_path / "out"]):
        done = cli(*arguments, "--set", change)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"{code}: ")
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_found_before_anything_is_written(cli, recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["plan", recipe], ["merge", recipe, tmp_path / "out"], ["run", recipe, "-o", tmp_path / "out"]):
        done = cli(*arguments, "--device", "cuda:7")
        assert (done.exit_code, done.stderr[:7], done.stderr.count("\n")) == (2, "RG406: ", 1)
        assert cli(*arguments, "--device", "gpu").exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_run_does_all_steps_and_a_second_run_nothing(cli, recipe: Path, tmp_path: Path) -> None:
    change = ["--set", "steps.merged.sweep={density: [0.1, 0.5]}", "--set", "steps.merged.lambda=0.9"]
    without = recipe.read_text().replace("    density: 0.2\n", "")
    recipe.write_text(without)
    first = cli("run", recipe, "-o", tmp_path / "out", *change)
    assert first.exit_code == 0, first.stderr
    names = ["merged@density=0.1", "merged@density=0.5"]
    assert all((tmp_path / "out" / name / "model.safetensors").exists() for name in names)
    second = cli("run", recipe, "-o", tmp_path / "out", *change, "--json")
    assert list(json.loads(second.stdout)["artefacts"]) == names
    assert second.stderr.count("done before") == 2


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.checkpoint.writer import ModelWriter

    def interrupt(self: ModelWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ModelWriter, "publish", interrupt)
        done = cli("merge", recipe, tmp_path / "out")
    assert done.exit_code == 130
    last = done.stderr.splitlines()[-1]
    assert last.startswith("interrupted; 21 of 21 tensors are kept in ")
    assert last.endswith(", and the same command goes on from there")
    assert not (tmp_path / "out").exists()
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_run_leaves_a_page_that_needs_nothing_else(cli: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    result = cli("run", recipe, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "merged" in page
    assert "https://" not in page.replace("https://arxiv.org", "")
