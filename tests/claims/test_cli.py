"""`regraft claims`: what it lists, runs and writes, and each error in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from regraft.cli.main import app
from regraft.errors import CODES


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> Callable[..., Any]:
    """`cli("run", 1)` in the folder that has the tiny claims."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.chdir(tiny.parent)
    return lambda *arguments: CliRunner().invoke(app, ["claims", *(str(a) for a in arguments)])


def test_list_run_and_list_again(cli: Callable[..., Any], tiny: Path) -> None:
    assert cli("list").stdout.count("not run") == 2
    done = cli("run", "1", "--seeds", "3", "--first-seed", "7", "--jobs", "1")
    assert done.exit_code == 0, done.stderr
    assert "01 Tiny: held (3 seeds)" in done.stdout
    assert "claim 01, seed 8" in done.stderr
    listed = json.loads(cli("list", "--json").stdout)
    assert [(one["claim"], one["verdict"], one["seeds"]) for one in listed] == [(1, "held", [7, 8, 9]), (2, None, [])]
    assert listed[0]["baselines"] == ["theirs"]
    assert (tiny / "results" / "01.json").exists()


def test_json_has_figures_effects_and_verdict(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("run", "2", "1", "--seeds", "2", "--jobs", "1", "--json", "--results", tmp_path / "r")
    (two, one) = json.loads(done.stdout)
    assert (two["claim"], one["claim"]) == (2, 1)
    assert one["checks"][0]["interval"][0] > 0
    assert one["seeds"]["1"]["figures"]["ours"] == 0.81


def test_smoke_is_said_not_to_be_judged(cli: Callable[..., Any]) -> None:
    done = cli("run", "1", "--scale", "smoke", "--seeds", "1", "--jobs", "1")
    assert "not judged" in done.stdout
    assert cli("list").stdout.count("not run") == 2


def test_the_page_has_verdicts_effects_and_plots(cli: Callable[..., Any], tmp_path: Path) -> None:
    cli("run", "1", "--seeds", "3", "--jobs", "1")
    done = cli("table", "--docs", tmp_path / "pages")
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "pages" / "claims.md").read_text(encoding="utf-8")
    assert "| [01](#01-tiny) | Ours is better. | **held** | 3 |" in page
    assert "| [02](#02-tiny) | Ours is better. | not run | 0 |" in page
    assert "+10.5 pt" in page
    assert "## 01 Tiny" in page
    assert "What it does and why." in page
    assert "| and not by luck (does not decide) |" in page
    assert "![Accuracy, %](assets/claims/01.svg)" in page
    assert (tmp_path / "pages" / "assets" / "claims" / "01.svg").exists()
    assert not (tmp_path / "pages" / "assets" / "claims" / "02.svg").exists()


def test_the_page_says_if_the_code_has_changed(cli: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    cli("run", "1", "--seeds", "2", "--jobs", "1")
    path = tiny / "01_tiny.py"
    path.write_text(path.read_text() + "# later\n")
    cli("table", "--docs", tmp_path / "pages")
    assert "the experiment's code has changed since" in (tmp_path / "pages" / "claims.md").read_text()


def fails(done: Any, code: str, *words: str) -> None:
    assert done.exit_code == 2
    assert f"{code}" in done.stderr
    assert code in CODES
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_a_number_without_a_claim(cli: Callable[..., Any]) -> None:
    fails(cli("run", "77"), "RG902", "no claim '77'", "known: 01, 02")


def test_a_file_that_is_no_claim(cli: Callable[..., Any], tiny: Path) -> None:
    (tiny / "03_none.py").write_text('"""Nothing."""\n')
    fails(cli("run", "3"), "RG902", "has no claim of its number", "03_none.py")
    (tiny / "04_other.py").write_text((tiny / "01_tiny.py").read_text())
    fails(cli("run", "4"), "RG902", "04_other.py")


def test_a_package_that_is_not_installed(cli: Callable[..., Any], tiny: Path) -> None:
    (tiny / "01_tiny.py").write_text("import not_installed_anywhere\n")
    fails(cli("run", "1"), "RG602", "not_installed_anywhere", "01_tiny.py")


def test_a_folder_without_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import regraft

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(regraft, "__path__", [str(tmp_path / "lib" / "python" / "regraft")])
    fails(CliRunner().invoke(app, ["claims", "list"]), "RG901", "clone of the repository")


def test_the_scale_of_papers_needs_inputs(cli: Callable[..., Any], tmp_path: Path) -> None:
    fails(cli("run", "1", "--scale", "paper"), "RG903", "your own models and data", "--inputs")
    inputs = tmp_path / "inputs.yaml"
    for content, words in (
        ("base: [", "cannot be read"),
        ("3", "cannot be read"),
        ("base: x", "experts is malformed"),
        ("{base: b, experts: {a: x}, metric: accuracy, validation: {}, test: {a: t}}", "'a' has no validation data"),
        ("{base: b, experts: {a: x}, metric: accuracy, validation: {a: v}, test: {}}", "'a' has no test data"),
        ("{base: b, experts: {}, metric: accuracy, validation: {}, test: {}}", "experts is malformed"),
    ):
        inputs.write_text(content)
        fails(cli("run", "1", "--scale", "paper", "--inputs", inputs), "RG903", words)
    fails(cli("run", "1", "--scale", "paper", "--inputs", tmp_path / "none.yaml"), "RG903", "cannot be read")
    inputs.write_text("{base: b, experts: {a: x}, metric: accuracy, validation: {a: v}, test: {a: t}}")
    fails(cli("run", "1", "--scale", "paper", "--inputs", inputs), "RG903", "claim 01 trains its own models")
