"""`regraft delta`: there and back, what is shown, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.mark.parametrize("kind", ["dense", "sparse", "bits"])
def test_there_and_back(kind: str, cli: Any, family: Path, tmp_path: Path) -> None:
    base, delta, out = family / "base", tmp_path / "delta", tmp_path / "out"
    made = cli("delta", "extract", family / "a", delta, "--base", base, "--kind", kind)
    assert made.exit_code == 0, made.stderr
    assert f"{kind} delta, " in made.stdout
    assert ("100.0000% of the entries exact" in made.stdout) is (kind == "dense")
    applied = cli("delta", "apply", delta, out, "--base", base, "--json")
    assert applied.exit_code == 0, applied.stderr
    assert json.loads(applied.stdout)["output"]["dtype"] == "float32"
    same = (out / "model.safetensors").read_bytes() == (family / "a" / "model.safetensors").read_bytes()
    assert same is (kind == "dense")
    shown = cli("delta", "show", delta)
    assert shown.exit_code == 0
    assert kind in shown.stdout
    assert "base, digest " in shown.stdout
    record = json.loads(cli("delta", "show", delta, "--json").stdout)
    assert record["base"]["name"] == "base"
    assert record["tensors"]["model.norm.weight"]["shape"] == [32]
    assert 0 < record["bytes"] <= (delta / "model.safetensors").stat().st_size


def test_json_and_card(cli: Any, family: Path, tmp_path: Path) -> None:
    arguments = ("--base", family / "base", "--kind", "sparse", "--density", "0.3", "--json")
    made = json.loads(cli("delta", "extract", family / "a", tmp_path / "delta", *arguments).stdout)
    assert (made["kind"], made["density"], made["encodings"]) == ("sparse", 0.3, {"sparse": 21})
    assert 0 < made["relative_error"] < 1
    head, text = (tmp_path / "delta" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    card = yaml.safe_load(head)
    assert card["base_model_relation"] == "adapter"
    assert "delta" in card["tags"]
    assert str(family) not in head + text + (tmp_path / "delta" / "delta.json").read_text()


def test_another_base_is_an_error_and_a_note_with_force(cli: Any, family: Path, tmp_path: Path) -> None:
    cli("delta", "extract", family / "a", tmp_path / "delta", "--base", family / "base")
    refused = cli("delta", "apply", tmp_path / "delta", tmp_path / "out", "--base", family / "b")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("RG211: this is not the base that the delta was made from (base)")
    forced = cli("delta", "apply", tmp_path / "delta", tmp_path / "out", "--base", family / "b", "--force")
    assert forced.exit_code == 0
    assert "note: this is not the base" in forced.stderr


def test_inspect_takes_deltas(cli: Any, family: Path, tmp_path: Path) -> None:
    cli("delta", "extract", family / "a", tmp_path / "delta", "--base", family / "base")
    alone = cli("inspect", tmp_path / "delta")
    assert alone.exit_code == 0, alone.stderr
    assert "delta, of which regraft delta show tells more" in alone.stdout
    assert "base (delta, digest " in alone.stdout
    applied = cli("inspect", f"{family}/base+{tmp_path}/delta", "--base", family / "base", "--json")
    assert applied.exit_code == 0, applied.stderr
    whole = json.loads(cli("inspect", family / "a", "--base", family / "base", "--json").stdout)
    assert json.loads(applied.stdout)["deltas"]["total"] == whole["deltas"]["total"]
    wrong = cli("inspect", f"{family}/b+{tmp_path}/delta")
    assert (wrong.exit_code, wrong.stderr.split(":")[0]) == (2, "RG211")


def test_a_kind_that_is_not_there_is_wrong_usage(cli: Any) -> None:
    assert cli("delta", "extract", "a", "b", "--base", "c", "--kind", "zip").exit_code == 2


def test_the_kinds_are_those_of_the_library() -> None:
    from regraft.checkpoint.delta_record import KINDS
    from regraft.cli.delta import Kind

    assert tuple(kind.value for kind in Kind) == KINDS
