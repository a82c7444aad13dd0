"""A stamp says "nothing has changed" only if nothing has: whatever may change a result is changed here, one by one."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from regraft.recipe import parse_recipe, stamp
from regraft.recipe.settings import Settings
from regraft.recipe.stamp import Stamp

COMMIT = "0123456789" * 4
TEXT = """
models: {base: ./base, a: ./a+./adapter, b: ./single/b.safetensors}
steps:
  merged: {merge: linear, models: [a, b], config_from: base}
  scores: {evaluate: accuracy, models: [base, merged], data: data/test.jsonl}
"""
RESULT = {"notes": ["é"], "value": [1.5, None]}


@dataclass
class Case:
    """One command, and a folder of files that pass for models: a stamp never looks into them."""

    home: Path
    command: str = "run"
    text: str = TEXT
    changes: list[str] = field(default_factory=list)
    out: str = "out"
    settings: Settings = field(default_factory=Settings)

    def stamp(self) -> Stamp:
        path = self.home / "recipe.yaml"
        return Stamp(self.command, path, self.text, self.changes, self.home / self.out, self.settings)

    def finish(self, meanwhile: Callable[[], Any] = lambda: None) -> str:
        """What `keep` says after a run."""
        made = self.stamp()
        made.watch(parse_recipe(self.text, path=self.home / "recipe.yaml", changes=self.changes))
        meanwhile()
        for name in ("model.safetensors", "artefacts/deep/down/x.json"):
            path = self.home / self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("made")
        return made.keep(RESULT)

    def result(self) -> Any:
        return self.stamp().result()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "regraft" / "finished"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    home = tmp_path / "home"
    for name in (
        "base/config.json", "base/model.safetensors", "a/config.json", "a/sub/tokenizer.json", "adapter/adapter.bin",
        "single/b.safetensors", "single/config.json", "data/test.jsonl", "data/images/1.png",
    ):  # fmt: skip
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("some")
    return Case(home)


def test_a_finished_run_tells_again_what_it_told(case: Case, cache: Path) -> None:
    assert case.result() is None
    assert case.finish() == ""
    assert case.result() == RESULT
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("setting", ["workers", "chunk", "max_memory"])
def test_what_only_changes_the_speed_does_not_matter(case: Case, setting: str) -> None:
    case.finish()
    case.settings = Settings(**{setting: 7})
    assert case.result() == RESULT


ASKED: dict[str, Callable[[Case], Any]] = {
    "text": lambda c: setattr(c, "text", TEXT + "# a remark\n"),
    "set": lambda c: setattr(c, "changes", ["steps.merged.normalize=false"]),
    "command": lambda c: setattr(c, "command", "merge"),
    "out": lambda c: setattr(c, "out", "other"),
    "out, written in another way": lambda c: setattr(c, "out", "./sub/../out"),
    "place of the recipe": lambda c: setattr(c, "home", c.home.rename(c.home.with_name("moved"))),
}  # fmt: skip
OTHER = {"device": "cuda", "sync": False}  # values that are not the usual ones; 1 is none for the other switches

for one in dataclasses.fields(Settings):
    if one.name not in ("workers", "chunk", "max_memory"):
        other = Settings(**{one.name: OTHER.get(one.name, 1)})
        ASKED[one.name] = lambda c, other=other: setattr(c, "settings", other)


@pytest.mark.parametrize("change", ASKED.values(), ids=list(ASKED))
def test_another_question_has_another_answer(case: Case, change: Callable[[Case], Any]) -> None:
    case.finish()
    change(case)
    assert case.result() is None


@pytest.mark.parametrize("package", ["torch", "transformers", "safetensors"])
def test_another_version_of_a_package_checks_everything(
    case: Case, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.finish()
    version = stamp.metadata.version
    monkeypatch.setattr(stamp.metadata, "version", lambda p: "99" if p == package else version(p))
    assert case.result() is None


def test_another_version_of_regraft_checks_everything(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.finish()
    monkeypatch.setattr(stamp, "__version__", "99")
    assert case.result() is None


def test_changed_code_checks_everything(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "regraft"
    (package / "recipe").mkdir(parents=True)
    (package / "__pycache__").mkdir()
    compiled = package / "__pycache__" / "engine.cpython-311.pyc"
    for path in (package / "recipe" / "stamp.py", package / "engine.py", compiled):
        path.write_text("")
    monkeypatch.setattr(stamp, "__file__", str(package / "recipe" / "stamp.py"))
    case.finish()
    compiled.write_text("compiled")
    (package / "__pycache__" / "engine.loop-1.py311.nbi").write_text("compiled by numba")
    assert case.result() == RESULT
    (package / "engine.py").write_text("changed")
    assert case.result() is None


def rewrite(path: Path) -> None:
    """Other bytes, the same size, the time of change set back."""
    before = path.stat()
    path.write_text("emos")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    folder.with_name("copy").rename(folder)


FILES: dict[str, Callable[[Path], Any]] = {
    "a weight file is touched": lambda f: os.utime(f / "base/model.safetensors"),
    "a weight file has other bytes": lambda f: rewrite(f / "base/model.safetensors"),
    "a file is longer": lambda f: (f / "a/config.json").write_text("longer"),
    "a file in a sub-folder is touched": lambda f: os.utime(f / "a/sub/tokenizer.json"),
    "a file joins a model": lambda f: (f / "a/chat_template.jinja").write_text(""),
    "a file leaves a model": lambda f: (f / "base/config.json").unlink(),
    "a model is gone": lambda f: shutil.rmtree(f / "a"),
    "a model is replaced by an equal one": lambda f: replace(f / "a"),
    "the adapter is touched": lambda f: os.utime(f / "adapter/adapter.bin"),
    "a single file is touched": lambda f: os.utime(f / "single/b.safetensors"),
    "the config beside a single file is gone": lambda f: (f / "single/config.json").unlink(),
    "data is touched": lambda f: os.utime(f / "data/test.jsonl"),
    "an image beside the data is touched": lambda f: os.utime(f / "data/images/1.png"),
    "an image joins the data": lambda f: (f / "data/2.jpg").write_text(""),
    "a reference is the path of a folder now": lambda f: (f / "a+./adapter").mkdir(parents=True),
    "an output is touched": lambda f: os.utime(f / "out/model.safetensors"),
    "an output has other bytes": lambda f: rewrite(f / "out/model.safetensors"),
    "a deep output is gone": lambda f: (f / "out/artefacts/deep/down/x.json").unlink(),
    "a file joins the output": lambda f: (f / "out/new").write_text(""),
    "the output is gone": lambda f: shutil.rmtree(f / "out"),
    "earlier steps join the output": lambda f: ((f / "out.steps").mkdir(), (f / "out.steps/x").write_text("")),
}  # fmt: skip


@pytest.mark.parametrize("change", FILES.values(), ids=list(FILES))
def test_files_that_changed_are_checked(case: Case, change: Callable[[Path], Any]) -> None:
    assert case.finish() == ""
    assert case.result() == RESULT
    change(case.home)
    assert case.result() is None


def test_what_is_beside_does_not_matter(case: Case) -> None:
    case.finish()
    (case.home / "data" / "remarks.txt").write_text("not data")
    (case.home / "base" / ".git").mkdir()
    (case.home / "base" / ".git" / "index").write_text("")
    assert case.result() == RESULT


def test_a_source_that_changes_during_the_run_leaves_no_stamp(case: Case, cache: Path) -> None:
    said = case.finish(meanwhile=lambda: os.utime(case.home / "base" / "model.safetensors"))
    assert said == "a source changed during the run"
    assert not cache.exists()


def test_an_output_that_is_gone_at_once_leaves_no_stamp(case: Case, cache: Path) -> None:
    made = case.stamp()
    made.watch(parse_recipe(TEXT))
    assert made.keep(RESULT) == "the output is gone"
    assert not cache.exists()


def test_the_output_is_the_folder_that_the_system_finds(case: Case) -> None:
    """`link/..` is the folder above the one that the link leads to."""
    (case.home / "deep" / "down").mkdir(parents=True)
    (case.home / "link").symlink_to("deep/down")
    case.out = "link/../out"
    assert case.finish() == ""
    assert case.result() == RESULT
    shutil.rmtree(case.home / "deep" / "out")
    assert case.result() is None


def test_a_forced_run_neither_leaves_nor_takes_a_stamp(case: Case, cache: Path) -> None:
    case.settings = Settings(force=True)
    assert case.finish() == "the run was forced"
    assert not cache.exists()
    case.settings = Settings()
    case.finish()
    case.settings = Settings(force=True)
    assert case.result() is None


def damaged(content: bytes) -> list[bytes]:
    middle = len(content) // 2
    other = bytes([content[middle] ^ 1])
    return [b"", b"\xff\x00", b"\n{}\n", content[:-20], content[:middle] + other + content[middle + 1 :]]


@pytest.mark.parametrize("kind", range(5))
def test_a_damaged_stamp_is_no_stamp(case: Case, cache: Path, kind: int) -> None:
    case.finish()
    (path,) = cache.iterdir()
    path.write_bytes(damaged(path.read_bytes())[kind])
    assert case.result() is None
    assert case.finish() == ""
    assert case.result() == RESULT


@pytest.mark.parametrize("facts", [{}, {"asked": None}])
def test_a_stamp_of_another_form_is_no_stamp(case: Case, cache: Path, facts: Any) -> None:
    case.finish()
    (path,) = cache.iterdir()
    path.write_bytes(stamp._sealed(facts))
    assert case.result() is None


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_error(case: Case, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "exists" in case.finish() or "directory" in case.finish()
    assert case.result() is None


def test_a_stamp_whose_place_is_taken_leaves_nothing_half(case: Case, cache: Path) -> None:
    case.finish()
    (path,) = cache.iterdir()
    path.unlink()
    (path / "x").mkdir(parents=True)
    assert case.finish() != ""
    assert list(cache.iterdir()) == [path]
    assert case.result() is None


def test_without_a_home_nothing_is_kept(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = sorted(tmp_path.iterdir())
    assert case.finish() == "there is no home folder to keep it in"
    assert sorted(tmp_path.iterdir()) == before


def test_only_the_newest_stamps_are_kept(case: Case, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamp, "MOST_STAMPS", 3)
    for number in range(5):
        case.out = f"out{number}"
        assert case.finish() == ""
        newest = max(cache.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    assert len(list(cache.iterdir())) == 3
    kept = [number for number in range(5) if dataclasses.replace(case, out=f"out{number}").result()]
    assert kept == [2, 3, 4]


@pytest.mark.parametrize("reference", ["org/model", "org/model@main", "org/model@v1.0", "./a+org/adapter"])
def test_a_model_of_the_hub_that_may_move_has_no_stamp(case: Case, reference: str) -> None:
    case.text = TEXT.replace("./a+./adapter", reference)
    assert "without a commit it may change" in case.finish()
    assert case.result() is None


def test_a_commit_of_the_hub_has_a_stamp_while_it_is_in_the_cache(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    case.text = TEXT.replace("./a+./adapter", f"org/model@{COMMIT}")
    assert "not in the local cache" in case.finish()
    blob = hub / "models--org--model" / "blobs" / "1"
    snapshot = hub / "models--org--model" / "snapshots" / COMMIT
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    blob.write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").write_text("{}")
    assert case.finish() == ""
    assert case.result() == RESULT
    (case.home / "org" / "model").mkdir(parents=True)  # a folder goes before a model of the Hub
    assert case.result() is None
    (case.home / "org" / "model").rmdir()
    assert case.result() == RESULT
    blob.write_text("changed")
    assert case.result() is None
