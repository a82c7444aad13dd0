"""The table of the zoo: what modules list, what was measured, and each error in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regraft.claims.catalogue import catalogue, markdown, read_records, rows
from regraft.cli.main import app
from regraft.errors import CODES, UserError

MODELS = """
import torch
from pathlib import Path
from safetensors.torch import save_file
from regraft.claims.zoo import Quality, entry

@entry(data="numbers")
def little(folder, *, seed, scale, value=0.9):
    save_file({"weight": torch.full((2, 3), float(seed))}, folder / "model.safetensors")
    return Quality("accuracy", value + seed / 100, 0.5, "a line", 0.1, chance=0.25)

ENTRIES = {"little": (little, "BertModel", {}), "weak": (little, "BertModel", {"value": 0.55})}
"""


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Callable[..., Any]:
    """`cli("zoo")` in a folder with two models of which one is not good enough."""
    (tiny / "models.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("REGRAFT_CACHE", str(tiny.parent / "cache"))
    monkeypatch.chdir(tiny.parent)
    return lambda *arguments: CliRunner().invoke(app, ["claims", "zoo", *(str(a) for a in arguments)])


def test_models_are_made_measured_and_shown(cli: Callable[..., Any], tiny: Path) -> None:
    assert "not made yet (regraft claims zoo --make): little, weak" in cli().stderr
    done = cli("little", "--make", "--seeds", "2", "--first-seed", "1")
    assert done.exit_code == 0, done.stderr
    assert "little, seed 1: accuracy 0.91 (a line 0.5, chance 0.25)" in done.stderr
    (shown,) = (line.split("  ") for line in cli().stdout.splitlines() if line.startswith("little"))
    assert [part.strip() for part in shown if part.strip()] == [
        "little", "numbers", "6", "1, 2", "0 s", "accuracy", "0.915 (0.91 to 0.92)", "a line 0.5", "0.25",
    ]  # fmt: skip
    stored = json.loads(cli("little", "--json").stdout)
    assert set(stored) == {"little"}
    assert stored["little"]["2"]["options"] == {"seed": 2, "scale": "laptop", "value": 0.9}
    assert "torch" in stored["little"]["2"]["versions"]
    assert cli("little", "--make").exit_code == 0  # a third seed beside them
    assert list(read_records(tiny / "results")["little"]) == ["0", "1", "2"]


def test_a_model_that_is_refused_stops_no_other_and_fails_the_command(cli: Callable[..., Any], tiny: Path) -> None:
    done = cli("weak", "little", "--make")
    assert done.exit_code == 2
    assert "RG906" in done.stderr
    assert "weak, seed 0: refused" in done.stderr
    assert set(read_records(tiny / "results")) == {"little"}


def test_smoke_keeps_no_figures(cli: Callable[..., Any], tiny: Path) -> None:
    assert cli("--make", "--scale", "smoke").exit_code == 0
    assert not (tiny / "results").exists()


def test_what_another_process_has_added_meanwhile_stays(cli: Callable[..., Any], tiny: Path) -> None:
    other = {"models": {"other": {"0": {"quality": {"value": 1}}}}}
    code = MODELS.replace(
        "    return Quality(",
        f"""    path = Path({str(tiny / "results" / "zoo.json")!r})
    path.parent.mkdir(exist_ok=True)
    path.write_text({json.dumps(json.dumps(other))})
    return Quality(""",
    )
    (tiny / "models.py").write_text(code, encoding="utf-8")
    assert cli("little", "--make", "--json").exit_code == 0
    assert set(read_records(tiny / "results")) == {"little", "other"}


def test_the_table_for_the_documentation(cli: Callable[..., Any], tiny: Path) -> None:
    cli("little", "--make")
    head, line, row = markdown(read_records(tiny / "results")).splitlines()
    assert head.startswith("| Model | Data | Parameters |")
    assert set(line) == set("|- ")
    assert row == "| little | numbers | 6 | 0 s, seed 0 | accuracy **0.9**; a line 0.5; chance 0.25 |"
    assert rows({}) == []


def fails(done: Any, code: str, *words: str) -> None:
    assert done.exit_code == 2
    assert code in CODES
    assert len(done.stderr.strip().splitlines()) == 1
    for word in (code, *words):
        assert word in done.stderr


def test_a_model_that_is_not_there(cli: Callable[..., Any]) -> None:
    fails(cli("littel"), "RG905", "no model 'littel'", "little")


def test_a_package_that_is_not_installed(cli: Callable[..., Any], tiny: Path) -> None:
    (tiny / "others.py").write_text("import not_installed_anywhere\nENTRIES = {}\n")
    fails(cli(), "RG602", "not_installed_anywhere", "others.py")


@pytest.mark.parametrize("content", ["[", '{"models": 3}', '{"models": {"a": 3}}', '{"models": {"a": {"0": {}}}}'])
def test_records_that_cannot_be_used(cli: Callable[..., Any], tiny: Path, content: str) -> None:
    (tiny / "results").mkdir()
    (tiny / "results" / "zoo.json").write_text(content)
    fails(cli(), "RG904", "zoo.json")


def test_records_that_cannot_be_written(cli: Callable[..., Any], tiny: Path) -> None:
    (tiny / "results").write_text("a file in the way")
    fails(cli("little", "--make", "--quiet"), "RG405", "results")


def test_the_scale_of_papers_is_refused(cli: Callable[..., Any]) -> None:
    done = cli("--make", "--scale", "paper")
    assert done.exit_code == 2
    assert "no models of the size of papers" in done.stderr


def test_a_name_that_two_modules_list(cli: Callable[..., Any], tiny: Path) -> None:
    (tiny / "others.py").write_text(MODELS, encoding="utf-8")
    with pytest.raises(UserError, match="listed twice"):
        catalogue(tiny)
