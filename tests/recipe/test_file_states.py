"""Whether files are still the same, told without reading them; the clock of the file system is the tests' own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from regraft.recipe import file_states
from regraft.recipe.file_states import UnknownState, files_below, observe, unchanged

SECOND = 10**9
NOW = 1_700_000_000 * SECOND


class Clock:
    """A file system whose times never move, as within one tick, and a time of day that only `sleep` moves."""

    def __init__(self, patch: pytest.MonkeyPatch, changed: int) -> None:
        self.changed, self.now, self.slept = changed, NOW, 0.0
        patch.setattr(file_states, "_state", self.state)
        patch.setattr(file_states, "_hash", lambda path: Path(path).read_text())
        patch.setattr(file_states.time, "time_ns", lambda: self.now)
        patch.setattr(file_states.time, "sleep", self.sleep)

    def state(self, path: str) -> list[Any]:
        return [Path(path).stat().st_size, self.changed, self.changed, 7]

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += round(seconds * SECOND)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "x").write_text("old")
    return str(tmp_path / "x")


@pytest.mark.parametrize("age", [-3600, 0, 1.9], ids=lambda a: f"{a} s old")
def test_a_second_change_within_the_tick_of_a_coarse_clock_is_seen(
    file: str, monkeypatch: pytest.MonkeyPatch, age: float
) -> None:
    Clock(monkeypatch, NOW - int(age * SECOND) // 10**6 * 10**6)
    recorded = observe([file])
    assert unchanged(recorded, [file])
    Path(file).write_text("new")
    assert not unchanged(recorded, [file])


@pytest.mark.parametrize(("age", "hashed"), [(2.1 * SECOND, False), (1 * SECOND, True)])
def test_a_coarse_clock_needs_two_seconds(file: str, monkeypatch: pytest.MonkeyPatch, age: float, hashed: bool) -> None:
    Clock(monkeypatch, NOW - int(age))
    assert (len(observe([file])[file]) == 5) == hashed


@pytest.mark.parametrize(("age", "hashed"), [(0.2 * SECOND, False), (0.05 * SECOND, True)])
def test_a_fine_clock_needs_a_tenth(file: str, monkeypatch: pytest.MonkeyPatch, age: float, hashed: bool) -> None:
    Clock(monkeypatch, NOW - int(age) + 1)
    assert (len(observe([file])[file]) == 5) == hashed


def test_a_large_file_is_waited_for_where_the_clock_is_fine(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_states, "_HASHED_BYTES", 2)
    clock = Clock(monkeypatch, NOW - SECOND // 50 + 1)
    assert len(observe([file])[file]) == 4
    assert clock.slept == pytest.approx(0.08, abs=1e-6)


def test_a_large_file_is_not_relied_on_where_the_clock_is_coarse(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_states, "_HASHED_BYTES", 2)
    clock = Clock(monkeypatch, NOW - SECOND)
    with pytest.raises(UnknownState, match="only just changed"):
        observe([file])
    assert clock.slept == 0


def test_a_hash_that_was_not_needed_is_not_made(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(file, (1, 1))
    monkeypatch.setattr(file_states.time, "time_ns", lambda: Path(file).stat().st_ctime_ns + 3 * SECOND)
    monkeypatch.setattr(file_states, "_hash", lambda path: pytest.fail("a file was read"))
    assert unchanged(observe([file]), [file])


def test_same_size_and_time_of_change_do_not_hide_other_bytes(file: str) -> None:
    """mtime can be set back, by `cp -p` or rsync; ctime cannot."""
    os.utime(file, (1, 1))
    recorded = {path: state[:4] for path, state in observe([file]).items()}
    Path(file).write_text("new")
    os.utime(file, (1, 1))
    assert not unchanged(recorded, [file])


def test_files_that_come_or_go_are_changes(file: str) -> None:
    recorded = observe([file])
    assert not unchanged(recorded, [])
    assert not unchanged(recorded, [file, file + "2"])
    assert not unchanged({}, [file])


def test_files_below_follows_links_once_and_enters_no_folder_of_tools(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("root/a", "root/sub/b", "root/.hidden", "root/.git/c", "root/.cache/d", "root/out/e", "elsewhere/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (root / "loop").symlink_to(root)
    (root / "there").symlink_to(elsewhere)
    (root / "nowhere").symlink_to(tmp_path / "no")
    found = {os.path.relpath(path, root) for path in files_below(str(root), [str(root / "out")])}
    assert found == {"a", "sub/b", ".hidden", "there/f"}
    assert list(files_below(str(root / "a"))) == [str(root / "a")]
    assert list(files_below(str(root / "no"))) == []


def test_too_many_files_are_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_states, "_MOST_FILES", 3)
    for name in "abcd":
        (tmp_path / name).write_text("")
    with pytest.raises(UnknownState, match="more than 3 files"):
        list(files_below(str(tmp_path)))
