"""A second run of a finished recipe: it says what a full check would say, and imports nothing that takes time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import save_fine_tune, save_model
from regraft.recipe import run as recipe_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "regraft" / "finished"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a merge and an evaluation; one of its models brings code, which is worth a note."""
    folder = tmp_path_factory.mktemp("images")
    save_fine_tune(folder / "a", save_model(folder / "base", "vit"), 1)
    (folder / "a" / "modeling_own.py").write_text("")
    rows = [{"pixel_values": torch.rand(8, 8).tolist(), "label": i % 10} for i in range(8)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(
        "models: {base: ./base, a: ./a}\n"
        "steps:\n"
        "  x: {merge: linear, models: [base, a]}\n"
        "  look: {evaluate: accuracy, models: [base, x], data: test.jsonl}\n"
    )
    return folder / "recipe.yaml"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the name of each command that makes the full check."""
    made: list[str] = []
    for name in ("merge", "run"):
        whole = getattr(recipe_run, name)
        monkeypatch.setattr(recipe_run, name, lambda *a, n=name, w=whole: (made.append(n), w(*a))[1])
    return made


def drop_times(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if ": done in " not in line)


@pytest.mark.parametrize("flags", [[], ["--json"], ["-q"], ["--json", "-q"]], ids=" ".join)
@pytest.mark.parametrize("command", ["merge", "run"])
def test_it_says_what_the_full_check_says(
    cli: Any, images: Path, tmp_path: Path, cache: Path, checks: list[str], command: str, flags: list[str]
) -> None:
    recipe = images
    if command == "merge":
        recipe = images.with_name("merge.yaml")
        recipe.write_text("".join(images.read_text().splitlines(keepends=True)[:3]))
    out = tmp_path / "out"
    arguments = [command, recipe, *([out] if command == "merge" else ["-o", out]), *flags]
    assert cli(*arguments).exit_code == 0
    shutil.rmtree(cache)
    full = cli(*arguments)
    assert checks == [command] * 2
    states = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    quick = cli(*arguments)
    assert checks == [command] * 2
    assert (quick.exit_code, quick.stdout, quick.stderr) == (0, full.stdout, drop_times(full.stderr))
    assert states == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    if not flags:
        assert "note: " in quick.stderr
        assert ("is up to date" if command == "merge" else "x: done before") in quick.stderr


@pytest.mark.parametrize("flags", [["-v"], ["--force"], ["--dry-run"], ["--set", "steps.merged.density=0.2"]])
def test_some_options_ask_for_the_full_check(
    cli: Any, recipe: Path, tmp_path: Path, checks: list[str], flags: list[str]
) -> None:
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    done = cli("merge", recipe, tmp_path / "out", *flags)
    assert done.exit_code == 0
    assert "merged: ties of a, b on base" in done.stdout + done.stderr or checks == ["merge", "merge"]
    del checks[:]
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    assert checks == (["merge"] if "--set" in flags else [])  # a stamp for each output: that of the last command


def test_compiled_code_beside_the_sources_changes_nothing(
    cli: Any, recipe: Path, tmp_path: Path, checks: list[str]
) -> None:
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    compiled = Path(recipe_run.__file__).parent / "__pycache__" / "left_by_test_rerun.nbi"
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_bytes(b"")
    try:
        assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    finally:
        compiled.unlink()
    assert checks == ["merge"]


def test_a_change_of_the_recipe_is_seen(cli: Any, recipe: Path, tmp_path: Path) -> None:
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    recipe.write_text(recipe.read_text().replace("0.2", "0.3"))
    refused = cli("merge", recipe, tmp_path / "out")
    assert (refused.exit_code, refused.stderr[:6]) == (2, "RG401:")


def test_a_lost_output_is_made_again(cli: Any, recipe: Path, tmp_path: Path) -> None:
    weights = tmp_path / "out" / "model.safetensors"
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    before = weights.read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert cli("merge", recipe, tmp_path / "out").exit_code == 0
    assert weights.read_bytes() == before


def test_a_cache_that_cannot_be_written_is_told_with_verbose_only(cli: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    quiet = cli("merge", recipe, tmp_path / "out")
    assert (quiet.exit_code, "stamp" in quiet.stderr) == (0, False)
    told = cli("merge", recipe, tmp_path / "out", "-v")
    assert told.exit_code == 0
    assert "no stamp for a quick second run: " in told.stderr


@pytest.mark.parametrize("command", ["merge", "run"])
def test_it_imports_nothing_that_takes_time(cli: Any, recipe: Path, tmp_path: Path, command: str) -> None:
    arguments = [command, str(recipe), *([] if command == "merge" else ["-o"]), str(tmp_path / "out")]
    assert cli(*arguments).exit_code == 0
    code = (
        "import sys, json\n"
        "from regraft.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    *said, modules = done.stderr.splitlines()
    assert said[-1].startswith("report: " if command == "run" else str(tmp_path / "out"))
    roots = {name.split(".")[0] for name in json.loads(modules)}
    # pydantic is imported by typer, for the options of a command, if it is installed
    assert not roots & {"torch", "transformers", "numpy", "huggingface_hub", "safetensors", "peft", "datasets"}
    assert "regraft.methods" not in json.loads(modules)
