"""Parts of a job that are noted are there for the same job, and for no other one, after whatever may pass."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.checkpoint import job_folder
from regraft.checkpoint.job_folder import JobFolder
from regraft.checkpoint.journal import Journal
from regraft.checkpoint.output import staging_of
from regraft.errors import UserError, UserWarningMessage

PARTS = ["a", "b", "c"]


def work(out: Path, stop: Callable[[], Any] | None = None, depends_on: Any = None) -> list[str]:
    """Do all parts, with an accident after the first two; the names of those that were really done."""
    done: list[str] = []

    def part(name: str) -> dict[str, Any]:
        if name == "c" and stop is not None:
            stop()
        done.append(name)
        return {"value": 0.1 + len(name), "none": None}

    with JobFolder(out, PARTS, depends_on or {"x": 1}) as job:
        for name in PARTS:
            assert job.once(name, lambda name=name: part(name)) == {"value": 1.1, "none": None}
            (job.staging / name).write_text(name)
        job.publish()
    return done


def interrupt() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    try:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    except OSError as error:
        raise UserError("RG103", "a file cannot be read", fix="check the disk") from error


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """An output of which two parts are done."""
    with pytest.raises(KeyboardInterrupt, match=r"^2 of 3 parts of the work are kept in .*, and the same command goes"):
        work(tmp_path / "out", interrupt)
    return tmp_path / "out"


def test_the_same_job_goes_on(stopped: Path) -> None:
    with pytest.warns(UserWarningMessage, match="2 of 3 parts of the work are there from a run that did not end"):
        assert work(stopped) == ["c"]
    assert sorted(path.name for path in stopped.iterdir()) == PARTS
    assert [path.name for path in stopped.parent.iterdir()] == ["out"]


def test_another_job_begins_anew(stopped: Path) -> None:
    assert work(stopped, depends_on={"x": 2}) == PARTS


def test_a_copy_is_not_believed(stopped: Path) -> None:
    staging = staging_of(stopped)
    shutil.copytree(staging, stopped.parent / "copy")
    shutil.rmtree(staging)
    (stopped.parent / "copy").rename(staging)
    assert work(stopped) == PARTS


def test_a_journal_that_cannot_be_read_is_not_believed(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Journal, "adopt", refuse)
    assert work(stopped) == PARTS


def test_without_a_boot_id_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_folder, "boot_id", lambda: "")
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work(tmp_path / "out", interrupt)
    assert list(tmp_path.iterdir()) == []
    assert work(tmp_path / "out") == PARTS


def test_a_read_that_fails_costs_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="check the disk; 2 of 3 parts of the work are kept in") as caught:
        work(tmp_path / "out", fail)
    assert caught.value.code == "RG103"
    with pytest.warns(UserWarningMessage):
        assert work(tmp_path / "out") == ["c"]


def test_an_inner_folder_has_said_it(tmp_path: Path) -> None:
    def inner() -> None:
        with JobFolder(tmp_path / ".out.regraft-partial" / "inner", PARTS, {}) as job:
            job.once("b", dict)
            fail()

    with pytest.raises(UserError) as caught:
        work(tmp_path / "out", inner)
    assert str(caught.value).count("and the same command goes on from there") == 1
    with pytest.warns(UserWarningMessage):
        assert work(tmp_path / "out") == ["c"]


def test_bad_input_leaves_nothing(tmp_path: Path) -> None:
    def bad() -> None:
        raise UserError("RG206", "a value is NaN")

    with pytest.raises(UserError, match="a value is NaN"):
        work(tmp_path / "out", bad)
    assert list(tmp_path.iterdir()) == []


def test_two_jobs_race_for_one_output(tmp_path: Path) -> None:
    with JobFolder(tmp_path / "out", PARTS, {}) as job:
        job.once("a", dict)
        with pytest.raises(UserError, match="another run is writing this output") as caught:
            work(tmp_path / "out")
        assert caught.value.code == "RG401"
        job.publish()
    assert (tmp_path / "out").is_dir()


def test_facts_that_cannot_be_written_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(UserError, match="the disk took no more") as caught:
        work(tmp_path / "out")
    assert caught.value.code == "RG402"
    assert list(tmp_path.iterdir()) == []


def test_only_parts_of_the_job_are_noted(tmp_path: Path) -> None:
    with JobFolder(tmp_path / "out", PARTS, {}) as job, pytest.raises(ValueError, match="'d' is no part"):
        job.once("d", dict)
