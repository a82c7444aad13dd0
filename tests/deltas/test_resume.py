"""Deltas and adapters that were stopped go on, and finished ones are recognised. Kills are in `tests/fuzz/kills.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fuzz.kills import differences
from regraft.adapters.extract import Extraction, Wanted
from regraft.adapters.publish import extract_lora
from regraft.checkpoint import ModelWriter, open_checkpoint
from regraft.checkpoint.output import OutputFolder
from regraft.deltas import extract as extraction
from regraft.deltas.apply import apply, open_delta
from regraft.deltas.extract import extract
from regraft.errors import UserError, UserWarningMessage


def after(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, count: int) -> list[int]:
    """Interrupt the `count`-th call of a function once it is done (0: never); the list gets an entry per call."""
    function, calls = getattr(of, name), []

    def watched(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        calls.append(len(calls) + 1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(of, name, watched)
    return calls


def commands(llama: Path, delta: Path) -> dict[str, Callable[..., Any]]:
    base, tuned = (open_checkpoint(str(llama / name)) for name in ("base", "tuned"))
    return {
        "extract": lambda out, **more: extract(tuned, base, out, "sparse", **more),
        "apply": lambda out, **more: apply(open_delta(delta), base, out, **more),
        "lora": lambda out, **more: extract_lora(tuned, base, out, Wanted(save=["all"], embeddings=True), **more),
    }


@pytest.fixture(scope="module")
def delta(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "delta"
    extract(open_checkpoint(str(llama / "tuned")), open_checkpoint(str(llama / "base")), out, "bits")
    return out


# What is watched, how many calls a whole run makes, and how many are left after an interruption at the sixth.
WATCHED: dict[str, tuple[str, Any, str, int, int]] = {
    "survey": ("extract", extraction, "largest", 21, 16),
    "store": ("extract", extraction, "_store", 21, 16),
    "apply": ("apply", ModelWriter, "finish", 21, 15),
    "lora": ("lora", Extraction, "_factors", 16, 11),
}


@pytest.mark.parametrize("what", list(WATCHED))
def test_what_was_stopped_goes_on(
    what: str, llama: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, of, name, whole, left = WATCHED[what]
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    run = commands(llama, delta)[command]
    with monkeypatch.context() as patch:
        calls = after(patch, of, name, 0)
        run(tmp_path / "whole")
        assert len(calls) == whole
    with monkeypatch.context() as patch:
        after(patch, of, name, 6)
        with pytest.raises(KeyboardInterrupt, match="and the same command goes on from there"):
            run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    calls = after(monkeypatch, of, name, 0)
    with pytest.warns(UserWarningMessage, match="there from a run that did not end"):
        run(tmp_path / "out")
    assert len(calls) <= left  # threads may have done some more before they heard of it
    assert differences(tmp_path / "out", renamed(tmp_path / "whole")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def renamed(whole: Path) -> Path:
    """Cards begin with the folder's name."""
    card = whole / "README.md"
    card.write_text(card.read_text().replace("# whole\n", "# out\n"))
    return whole


@pytest.mark.parametrize("command", ["extract", "apply", "lora"])
def test_a_finished_output_is_recognised(command: str, llama: Path, delta: Path, tmp_path: Path) -> None:
    run, out = commands(llama, delta)[command], tmp_path / "out"
    first = run(out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / ".out.regraft-partial").mkdir()
    with pytest.warns(UserWarningMessage, match="out is up to date"):
        again = run(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert getattr(again, "changes", again) == getattr(first, "changes", again)
    run(out, force=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} != before


@pytest.mark.parametrize("command", ["extract", "apply", "lora"])
def test_an_output_of_something_else_is_taken(command: str, llama: Path, delta: Path, tmp_path: Path) -> None:
    other = commands(llama, delta)["lora" if command != "lora" else "apply"]
    other(tmp_path / "out")
    with pytest.raises(UserError, match="the output folder is not empty") as caught:
        commands(llama, delta)[command](tmp_path / "out")
    assert caught.value.code == "RG401"


def test_another_delta_is_no_finished_one(llama: Path, tmp_path: Path) -> None:
    """Of another kind, of another model, and damaged."""
    base, tuned = (open_checkpoint(str(llama / name)) for name in ("base", "tuned"))
    out = tmp_path / "out"
    extract(tuned, base, out, "sparse")
    other = shutil.copytree(llama / "tuned", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for model, kind in ((tuned, "bits"), (open_checkpoint(str(other)), "sparse")):
        with pytest.raises(UserError, match="not empty"):
            extract(model, base, out, kind)  # type: ignore[arg-type]
    (out / "delta.json").write_text("{}")
    with pytest.raises(UserError, match="not empty"):
        extract(tuned, base, out, "sparse")


@pytest.mark.parametrize("command", ["extract", "apply", "lora"])
def test_two_runs_race_for_one_output(command: str, llama: Path, delta: Path, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"):
        with pytest.raises(UserError, match="another run is writing this output") as caught:
            commands(llama, delta)[command](tmp_path / "out")
        assert caught.value.code == "RG401"


def test_factors_that_went_missing_are_made_again(
    llama: Path, delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commands(llama, delta)["lora"]
    with monkeypatch.context() as patch:
        after(patch, Extraction, "_factors", 6)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    (tmp_path / ".out.regraft-partial" / "factors" / "2.safetensors").unlink()
    with pytest.warns(UserWarningMessage):
        run(tmp_path / "out")
    run(tmp_path / "whole")
    assert differences(tmp_path / "out", renamed(tmp_path / "whole")) == []


def test_a_run_that_died_while_it_put_things_in_place_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = (open_checkpoint(str(llama / name)) for name in ("base", "tuned"))
    with monkeypatch.context() as patch:
        after(patch, extraction, "_keep_files", 1)
        with pytest.raises(KeyboardInterrupt):
            extract(tuned, base, tmp_path / "out")
    calls = after(monkeypatch, extraction, "_store", 0)
    with pytest.warns(UserWarningMessage):
        extract(tuned, base, tmp_path / "out")
    assert calls == []
    extract(tuned, base, tmp_path / "whole")
    assert differences(tmp_path / "out", renamed(tmp_path / "whole")) == []
